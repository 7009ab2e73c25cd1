//! The backup that a new point can be reached from.

use agent_api::ErrorKind;
use catalog::Catalog;
use catalog::ids::BackupId;
use catalog::model::{Manifest, Point};
use catalog::reach::{NoBase, Reach};
use catalog::repo::BackupState;
use catalog::wal::WalName;
use tokio::time::{Duration, Instant};

use crate::commands::backup::nodes::Part;
use crate::failure::{Failure, Result};

/// How long a backup that was found is used without looking for a newer one.
const LOOK_AGAIN: Duration = Duration::from_mins(30);

/// The newest backup of the same nodes in the same epochs, as far as it was looked for.
#[derive(Debug, Default)]
pub(super) struct Bases {
    found: Option<(Manifest, Instant)>,
}

impl Bases {
    /// Makes sure that there is a backup that a point made now could lie on: nothing is locked or marked for a point
    /// that nobody could restore.
    ///
    /// # Errors
    /// That there is none, with the command that makes one; what the catalog says.
    pub(super) async fn expect(&mut self, catalog: &Catalog, parts: &[Part]) -> Result<()> {
        if let Some((manifest, at)) = &self.found
            && at.elapsed() < LOOK_AGAIN
            && is_of(manifest, parts)
            && catalog.manifest(&manifest.backup_id).await.is_ok()
        {
            return Ok(());
        }
        self.found = None;
        let complete = catalog.backups().await?.into_iter();
        let complete = complete.filter_map(|listed| match listed.state {
            BackupState::Complete(manifest) => Some(*manifest),
            _ => None,
        });
        let newest = complete
            .filter(|manifest| is_of(manifest, parts))
            .max_by_key(|manifest| manifest.completed);
        let newest = newest.ok_or_else(|| {
            let message = "there is no backup of all these nodes as they are now, so no point of them could be restored";
            Failure::new(ErrorKind::Conflict, message).next(BACKUP)
        })?;
        self.found = Some((newest, Instant::now()));
        Ok(())
    }

    /// The backup that leads to `point`, which is in the bucket but for its own object. Where the point's WAL joins the
    /// backup's own, as its agents say, nothing has to be listed.
    ///
    /// # Errors
    /// That none does, and why; what the catalog says.
    pub(super) async fn of(&mut self, catalog: &Catalog, point: &Point) -> Result<BackupId> {
        if let Some((manifest, _)) = &self.found
            && joins(manifest, point)
        {
            return Ok(manifest.backup_id.clone());
        }
        let reach = Reach::read(catalog).await?;
        match reach.base(point, &[]) {
            Ok(manifest) => {
                self.found = Some((manifest.clone(), Instant::now()));
                Ok(manifest.backup_id.clone())
            }
            Err(why) => {
                self.found = None;
                Err(unreachable(&why))
            }
        }
    }
}

/// What makes a base.
const BACKUP: &str = "make a backup of all these nodes first: gs_pitr backup";

fn unreachable(why: &NoBase) -> Failure {
    let message = format!("no backup leads to the point, so it was not written: {why}");
    Failure::new(ErrorKind::Conflict, message).next(BACKUP)
}

/// Whether a backup has copies of exactly these nodes, in the epochs they are in.
fn is_of(manifest: &Manifest, parts: &[Part]) -> bool {
    manifest.nodes.len() == parts.len()
        && parts.iter().all(|part| {
            let its = |copy: &&catalog::model::NodeBackup| copy.node_id == part.node;
            let copy = manifest.nodes.iter().find(its);
            copy.is_some_and(|copy| copy.epoch == part.epoch)
        })
}

/// Whether the unbroken stretches of WAL that the point lies in begin within the backup's own WAL, or right behind it.
fn joins(manifest: &Manifest, point: &Point) -> bool {
    manifest.nodes.len() == point.nodes.len()
        && manifest.nodes.iter().all(|copy| {
            let mark = point.nodes.iter().find(|it| it.node_id == copy.node_id);
            let number = |name: &str| name.parse::<WalName>().ok()?.number(copy.wal_segment_size);
            let Some(mark) =
                mark.filter(|mark| mark.epoch == copy.epoch && mark.timeline == copy.timeline)
            else {
                return false;
            };
            match (
                number(&mark.wal_first),
                number(&copy.wal_last),
                number(&mark.wal_last),
            ) {
                (Some(first), Some(last), Some(end)) => first <= last + 1 && end > last,
                _ => false,
            }
        })
}
