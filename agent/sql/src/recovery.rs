//! What a server that recovers is asked.

use crate::connect::NodeConnection;
use crate::error::SqlError;

impl NodeConnection {
    /// Whether replay pauses, as it does at a target with `pause_at_recovery_target`. Only openGauss is asked.
    ///
    /// Source: `pg_is_xlog_replay_paused`, `src/gausskernel/storage/access/transam/xlogfuncs.cpp`.
    ///
    /// # Errors
    /// The server's; also if it does not recover any more.
    pub async fn replay_is_paused(&self) -> Result<bool, SqlError> {
        let what = "asking whether replay pauses";
        let row = self.row(what, "SELECT pg_is_xlog_replay_paused()").await?;
        row.flag(0)
    }
}
