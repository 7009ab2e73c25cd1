//! PTRACK of PostgreSQL: an extension that notes which pages change (github.com/postgrespro/ptrack).

use crate::connect::NodeConnection;
use crate::error::SqlError;

impl NodeConnection {
    /// The version of the extension `ptrack` in the database of this session; `None`: it is not installed there.
    ///
    /// # Errors
    /// Those of a statement.
    pub async fn ptrack_version(&self) -> Result<Option<String>, SqlError> {
        let what = "looking for the extension ptrack";
        // D 53.22 pg_extension; as pg_probackup asks (get_ptrack_version, ptrack.c).
        let sql = "SELECT extversion FROM pg_extension WHERE extname = 'ptrack'";
        let rows = self.rows(what, sql).await?;
        let row = rows.first().map(|row| row.text(0).map(str::to_owned));
        row.transpose()
    }
}
