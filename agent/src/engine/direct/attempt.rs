//! From backup start to backup stop: the direct engine's copy, whole in the bucket.

use std::sync::Arc;
use std::time::Duration;

use agent_api::{ApiError, BackupSpec, ErrorKind, Phase};
use agent_sql::{NodeConnection, StopResult};
use agent_wal::{Lsn, SegmentName};
use catalog::keys;
use catalog::model::Tablespace;
use jiff::Timestamp;
use pipeline::index::IndexBuilder;

use super::copy::{self, Copied, CopyJob};
use super::walk::{Source, TablespaceList};
use crate::database::connect_options;
use crate::engine::attempt::{Attempt, LANES, cancelled, void};
use crate::engine::errors;
use crate::engine::manifest::CopyInBucket;
use crate::engine::node::Node;
use crate::wal::ship::Shipper;

/// A checkpoint that does not hurry takes up to `checkpoint_timeout`, which is at most a day.
const CHECKPOINT_DEADLINE: Duration = Duration::from_hours(25);
/// How long threads that were cancelled may take to notice.
const THREADS_GRACE: Duration = Duration::from_secs(30);

/// A backup that was started: it lives as long as its session.
#[derive(Debug)]
pub struct Started {
    sql: NodeConnection,
    start: Lsn,
    timeline: u32,
    at: Timestamp,
    source: Source,
}

impl Started {
    /// The first WAL segment that the copy needs.
    #[must_use]
    pub fn first_segment(&self, node: &Node) -> SegmentName {
        SegmentName::of_lsn(self.timeline, self.start, node.segment_size())
    }
}

impl Attempt<'_> {
    /// Starts the backup (steps 2 and 3). WAL must be held.
    ///
    /// # Errors
    /// Of the database; if the hold does not reach back to the start.
    pub async fn start(&self) -> Result<Started, ApiError> {
        let node = self.node;
        let restart = self.hold.kept_from(&node.sql).await?;
        let options = connect_options(&self.cx.config, "gs_pitr backup")?;
        let sql = NodeConnection::connect(&options, self.work.clone())
            .await
            .map_err(errors::sql)?;
        self.measure();
        let at = Timestamp::now();
        let start = sql
            .start_backup(
                &label(self.spec),
                self.spec.fast_checkpoint,
                CHECKPOINT_DEADLINE,
            )
            .await
            .map_err(errors::sql)?;
        if restart > start {
            let message = format!(
                "{} holds WAL from {restart} only, the backup starts at {start}",
                self.hold
            );
            return Err(void(message));
        }
        let timeline = node.sql.wal_position().await.map_err(errors::sql)?.timeline;
        let started = Started {
            sql,
            start,
            timeline,
            at,
            source: node.source().map_err(errors::copy)?,
        };
        Ok(started)
    }

    /// Sums up what there is to do while the checkpoint runs. Only for the progress bar: its errors are met
    /// again, and reported, by the copy.
    fn measure(&self) {
        let Ok(source) = self.node.source() else {
            return;
        };
        let (report, cancel) = (self.cx.report.clone(), self.work.clone());
        tokio::task::spawn_blocking(move || {
            if let Ok(bytes) = copy::measure(&source, &cancel) {
                report.expect_bytes(bytes);
            }
        });
    }

    /// Copies, stops the backup, and finishes packs and index (steps 4 to 10).
    ///
    /// # Errors
    /// Whatever voids the attempt. Nothing of it is under way then.
    pub async fn copy(
        &self,
        started: Started,
        shipper: &Shipper,
    ) -> Result<CopyInBucket, ApiError> {
        self.cx.report.phase(Phase::Copying);
        let index = Arc::new(IndexBuilder::new());
        let (packs, lanes) = self.packs(LANES).await?;
        let job = CopyJob {
            source: started.source.clone(),
            attachments: self.node.attachments.clone(),
            data_checksums: self.node.facts.data_checksums,
            segment_blocks: self.node.control.relation_segment_blocks,
            index: Arc::clone(&index),
            report: self.cx.report.clone(),
            gentle: self.spec.pace.is_gentle(),
            cancel: self.work.child_token(),
        };
        let mut answer = copy::start(job, lanes).map_err(errors::internal)?;
        let copied = tokio::select! {
            biased;
            answer = &mut answer => match answer {
                Ok(copied) => copied.map_err(errors::copy),
                Err(_) => Err(errors::internal("the thread `gs-walk` panicked")),
            },
            error = self.spoiled(&started.sql, shipper) => {
                self.work.cancel();
                // Nobody reads the data directory any more when this returns.
                let _ = tokio::time::timeout(THREADS_GRACE, &mut answer).await;
                Err(error)
            }
        };
        let copied = match copied {
            Ok(copied) => copied,
            Err(error) => {
                self.work.cancel();
                packs.abort().await;
                return Err(error);
            }
        };
        let stopped = self.stop(&started).await?;
        let finish = async {
            let packs = packs.finish().await.map_err(errors::pipeline)?;
            let key = keys::index(&self.spec.backup_id, self.spec.node_id, self.spec.attempt);
            let index = index.write(self.uploader, key).await;
            Ok::<_, ApiError>((packs, index.map_err(errors::pipeline)?))
        };
        let (packs, index) = tokio::select! {
            biased;
            finished = finish => finished?,
            error = shipper.failed() => return Err(error),
        };
        let corrupt_pages = self.corrupt_pages(&copied, started.start, stopped.insert);
        Ok(CopyInBucket {
            start: started.start,
            stop: stopped.result.lsn,
            timeline: started.timeline,
            started: started.at,
            completed: stopped.at,
            tablespaces: linked(&started.source.tablespaces, &stopped.map)?,
            backup_label: text("backup_label", stopped.result.label_file)?,
            tablespace_map: (!stopped.map.is_empty()).then_some(stopped.map),
            files: copied.files,
            plain_bytes: copied.plain_bytes,
            corrupt_pages,
            links: copied.links,
            probackup: None,
            packs,
            index,
        })
    }

    /// Waits for what makes it useless to go on.
    async fn spoiled(&self, backup: &NodeConnection, shipper: &Shipper) -> ApiError {
        tokio::select! {
            biased;
            () = self.work.cancelled() => cancelled(),
            error = shipper.failed() => error,
            error = backup.wait_lost() => errors::sql(error),
        }
    }

    async fn stop(&self, started: &Started) -> Result<Stopped, ApiError> {
        let position = started.sql.wal_position().await.map_err(errors::sql)?;
        if position.timeline != started.timeline {
            let message = format!(
                "the database changed from timeline {} to {} during the copy",
                started.timeline, position.timeline
            );
            return Err(void(message));
        }
        let result = started.sql.stop_backup().await.map_err(errors::sql)?;
        started.sql.close();
        Ok(Stopped {
            map: text("tablespace_map", result.map_file.clone())?,
            result,
            insert: position.insert,
            at: Timestamp::now(),
        })
    }

    /// Names the pages that are damaged on the source; pages that were being written are none.
    fn corrupt_pages(&self, copied: &Copied, start: Lsn, insert: Lsn) -> Vec<String> {
        let mut corrupt: Vec<_> = copied
            .bad_pages
            .iter()
            .filter(|page| !page.is_torn(start, insert))
            .collect();
        corrupt.sort_by(|a, b| (&a.path, a.block).cmp(&(&b.path, b.block)));
        for page in &corrupt {
            self.cx.report.warning(format!(
                "the database has a corrupt page: `{}` block {} (the backup has it as it is)",
                page.path, page.block
            ));
        }
        if copied.more_bad_pages > 0 {
            self.cx.report.warning(format!(
                "{} more pages have a wrong checksum",
                copied.more_bad_pages
            ));
        }
        corrupt
            .iter()
            .map(|page| format!("{} {}", page.path, page.block))
            .collect()
    }
}

struct Stopped {
    result: StopResult,
    map: String,
    /// Where the WAL ended when everything had been read.
    insert: Lsn,
    at: Timestamp,
}

/// The tablespaces of the copy. Those that the server knew of when the backup began stand in its map; we read the
/// directory a moment later, and one made in that moment would be restored wrongly.
fn linked(copied: &TablespaceList, map: &str) -> Result<Vec<Tablespace>, ApiError> {
    let mapped = |oid: u32| {
        map.lines().any(|line| {
            let named = line.split_once(' ').map(|(named, _)| named);
            named.and_then(|named| named.parse().ok()) == Some(oid)
        })
    };
    for tablespace in &copied.linked {
        if !mapped(tablespace.oid) {
            let message = format!(
                "the tablespace {} (`{}`) was created in the moment the backup began",
                tablespace.oid, tablespace.location
            );
            return Err(void(message));
        }
    }
    Ok(copied.linked.clone())
}

/// What the database shows while the backup runs; a line break would forge a line of `backup_label`.
fn label(spec: &BackupSpec) -> String {
    let mut label = format!("gs_pitr {}", spec.backup_id);
    if let Some(words) = &spec.label {
        label.push(' ');
        let plain = words.chars().map(|c| if c.is_control() { ' ' } else { c });
        label.extend(plain.take(200));
    }
    label
}

fn text(what: &str, bytes: Vec<u8>) -> Result<String, ApiError> {
    String::from_utf8(bytes).map_err(|_| {
        let message = format!("the server's {what} names a path that is not UTF-8");
        ApiError::new(ErrorKind::Database, message)
    })
}
