//! The store, asked with our own credentials.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use agent_api::{ErrorKind, Finding};
use catalog::journal::{OperationJournal, OperationStart};
use catalog::{Catalog, CatalogError, keys};
use futures_util::TryStreamExt as _;
use pipeline::probe::{self, Probe, ProbeError, ProbeKeys};
use pipeline::store::{Key, ObjectStore, StoreError};
use tokio::time::timeout;
use uuid::Uuid;

use super::report::{Report, of_failure};
use crate::failure::{Failure, Result};
use crate::journalled::ourselves;
use crate::repo;
use crate::settings::Settings;

/// For a request or a few that are no probe.
const ASK: Duration = Duration::from_secs(25);
/// For all that was written to be listed and deleted.
const CLEAN_UP: Duration = Duration::from_mins(1);

/// Our own part in the names of probe objects.
const OURS: &str = "operator";

/// An agent's part in the names of probe objects.
pub(super) fn participant(number: usize) -> String {
    format!("agent-{}", number + 1)
}

/// The store, if one is given and can be meant.
#[derive(Debug)]
pub(super) struct Store {
    operation: Uuid,
    open: Option<Open>,
}

#[derive(Debug)]
struct Open {
    store: Arc<dyn ObjectStore>,
    keys: ProbeKeys,
    journal: Option<OperationJournal>,
    catalog: Option<Catalog>,
    usable: bool,
}

fn probe_key(operation: Uuid, name: &str) -> Result<Key> {
    keys::probe(operation, name)
        .map_err(|error| Failure::new(ErrorKind::Internal, error.to_string()))
}

impl Store {
    /// Opens it, and journals which uploads `agents` agents and we will begin, so that prune finds what is left if
    /// we are killed.
    pub(super) async fn begin(
        operation: Uuid,
        settings: &Settings,
        agents: usize,
        report: &mut Report,
    ) -> Self {
        let mut begun = Self {
            operation,
            open: None,
        };
        if !settings.has_repo() {
            report.not_checked("the store: no `--repo` is given");
            return begun;
        }
        match Open::begin(operation, settings, agents).await {
            Ok(open) => begun.open = Some(open),
            Err(failure) => {
                report.not_checked("the store: its settings cannot be used");
                report.failure(None, "store", failure);
            }
        }
        begun
    }

    /// The check's id.
    pub(super) fn operation(&self) -> Uuid {
        self.operation
    }

    /// Whether it is to be asked.
    pub(super) fn is_given(&self) -> bool {
        self.open.is_some()
    }

    /// What is in it, if it is a repository.
    pub(super) fn catalog(&self) -> Option<&Catalog> {
        self.open.as_ref()?.catalog.as_ref()
    }

    /// The store itself, if it took and gave back objects.
    pub(super) fn usable(&self) -> Option<&Arc<dyn ObjectStore>> {
        let open = self.open.as_ref()?;
        open.usable.then_some(&open.store)
    }

    /// Asks it for every promise.
    pub(super) async fn probe(&mut self, report: &mut Report) {
        if let Some(open) = &mut self.open {
            open.probe(report).await;
        }
    }

    /// Deletes what this check and the agents wrote. Whether something is left.
    pub(super) async fn clean_up(&mut self, report: &mut Report) -> bool {
        let Some(open) = self.open.take() else {
            return false;
        };
        open.clean_up(self.operation, report).await
    }
}

impl Open {
    async fn begin(operation: Uuid, settings: &Settings, agents: usize) -> Result<Self> {
        let store = repo::store(settings)?;
        let keys = ProbeKeys {
            absent: probe_key(operation, &format!("{OURS}-absent"))?,
            object: probe_key(operation, &format!("{OURS}-object"))?,
            upload: probe_key(operation, &format!("{OURS}-upload"))?,
        };
        let mut uploads = vec![keys.upload.clone()];
        for agent in 0..agents {
            uploads.push(probe_key(
                operation,
                &format!("{}-upload", participant(agent)),
            )?);
        }
        let start = OperationStart {
            operation,
            kind: "check".into(),
            backup_id: None,
            node_id: None,
            log_head: None,
        };
        let journal = async {
            let by = Some(ourselves("gs_pitr check"));
            let journal = OperationJournal::start_by(Arc::clone(&store), start, by).await?;
            journal.intend_all(&uploads).await?;
            Ok::<_, CatalogError>(journal)
        };
        // What is wrong with the store the probes find out, and say better.
        let journal = timeout(ASK, journal).await.ok().and_then(Result::ok);
        Ok(Self {
            store,
            keys,
            journal,
            catalog: None,
            usable: false,
        })
    }

    async fn probe(&mut self, report: &mut Report) {
        let (probes, now) = tokio::join!(
            probe::probe(&*self.store, &self.keys),
            timeout(ASK, self.store.now())
        );
        self.usable = probes.usable();
        report.all(None, probes.all.iter().map(finding));
        if let Ok(Ok(now)) = now {
            report.add(None, its_clock(now));
        }
        if !self.usable {
            report.not_checked("what is in the repository: the store does not do");
            return;
        }
        let opened = timeout(ASK, Catalog::open(Arc::clone(&self.store))).await;
        match opened {
            Ok(Ok(catalog)) => {
                let id = catalog.repository().repository_id;
                report.fine("repository", format!("repository {id}"));
                self.catalog = Some(catalog);
            }
            Ok(Err(CatalogError::NoRepository { .. })) => {
                report.fine("repository", "none yet: the first backup makes it");
            }
            Ok(Err(error)) => report.failure(None, "repository", error.into()),
            Err(_) => report.failure(None, "repository", late()),
        }
    }

    async fn clean_up(self, operation: Uuid, report: &mut Report) -> bool {
        let prefix = keys::operation_prefix(operation);
        if let Some(journal) = &self.journal
            && !matches!(timeout(ASK, journal.ended(None)).await, Ok(Ok(())))
        {
            tracing::info!("the check's journal was not ended");
        }
        let cleaned = timeout(CLEAN_UP, delete_below(&*self.store, &prefix)).await;
        let why = match cleaned {
            Ok(Ok(0)) => return false,
            Ok(Ok(count)) => {
                let message = format!("what the check wrote ({count} objects) is deleted again");
                report.fine("store clean-up", message);
                return false;
            }
            Ok(Err(why)) => why,
            Err(_) => "no answer in time".to_owned(),
        };
        if self.journal.is_none() && !self.usable {
            // Nothing was ever written, so far as can be seen.
            return false;
        }
        let message = format!("objects of this check stay below `{prefix}`: {why}");
        let mend = "give the operator's credentials s3:DeleteObject, or let `gs_pitr prune` remove them; they do no harm";
        report.add(None, Finding::warning("store clean-up", message, mend));
        true
    }
}

/// Deletes all objects below a prefix, and looks that they are gone. How many there were.
async fn delete_below(store: &dyn ObjectStore, prefix: &str) -> std::result::Result<usize, String> {
    let list = async || {
        let listed = store.list(prefix).map_ok(|meta| meta.key);
        let listed: std::result::Result<Vec<Key>, StoreError> = listed.try_collect().await;
        listed.map_err(|error| error.to_string())
    };
    let all = list().await?;
    if all.is_empty() {
        return Ok(0);
    }
    let refused = store
        .delete(&all)
        .await
        .map_err(|error| error.to_string())?;
    if let Some(first) = refused.first() {
        return Err(format!(
            "{} of {} could not be deleted: {first}",
            refused.len(),
            all.len()
        ));
    }
    match list().await?.as_slice() {
        [] => Ok(all.len()),
        left => Err(format!("{} were deleted and are still listed", left.len())),
    }
}

fn late() -> Failure {
    let message = format!("the store did not answer within {} s", ASK.as_secs());
    Failure::new(ErrorKind::StoreUnavailable, message)
}

fn finding(probe: &Probe) -> Finding {
    let name = format!("store {}", probe.name);
    let error = match &probe.result {
        Ok(message) => return Finding::fine(name, message),
        Err(error) => error,
    };
    let failure = match error {
        ProbeError::Lacking(message) => {
            let mend = "nothing has to be done; a store that keeps SHA-256 checksums is better";
            return Finding::warning(name, message, mend);
        }
        ProbeError::Store(StoreError::NotFound(_)) => {
            let message = format!("what was just written is not there: {error}");
            Failure::new(ErrorKind::StoreUnavailable, message)
                .next("use a store whose reads see what was written before (S3, MinIO)")
        }
        ProbeError::Store(error) => error.clone().into(),
        ProbeError::Broken(message) => Failure::new(ErrorKind::StoreDenied, message).next(
            "use another store, or a newer version of this one: backups would not be safe in it",
        ),
        ProbeError::Late(_) => Failure::new(ErrorKind::StoreUnavailable, error.to_string()),
    };
    of_failure(&name, failure)
}

/// The store cuts its time off at whole seconds.
fn its_clock(now: SystemTime) -> Finding {
    let apart = match now.duration_since(SystemTime::now()) {
        Ok(ahead) => ahead.as_secs_f64(),
        Err(behind) => -behind.duration().as_secs_f64(),
    };
    agent_api::clock("store clock", "the store's clock", apart + 0.5)
}
