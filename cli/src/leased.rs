//! The lease of a command: taken before it works, renewed while it works, proved before it commits.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use agent_api::ErrorKind;
use catalog::fence::{Abandoned, Fenced};
use catalog::ids::BackupId;
use catalog::lease::{HeldLease, LeaseRequest, Taken};
use catalog::model::{Holder, Lease, LeaseScope, Verdict};
use catalog::{Catalog, CatalogError};
use serde_json::json;
use tokio::sync::Mutex;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::failure::{Failure, Result};
use crate::journalled;
use crate::printer::Printer;
use crate::settings::Settings;

/// Renewals in the life of a lease.
const RENEWALS: u32 = 3;
/// How long the store may take to prove a lease, over all attempts.
const PROOF_WITHIN: Duration = Duration::from_mins(2);
/// How long an ordered end waits for the lease to be given back: it runs out anyway.
const RELEASE_WITHIN: Duration = Duration::from_secs(30);

/// A lease that this command holds. Dropped, it is not renewed any more and runs out by itself.
#[derive(Debug)]
pub(crate) struct Leased {
    held: Arc<Mutex<Option<HeldLease>>>,
    lost: Arc<OnceLock<Failure>>,
    stop: CancellationToken,
}

impl Drop for Leased {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Leased {
    /// Takes the lease of `scope` for `operation`, run by `command` (such as `gs_pitr restore`), and renews it
    /// in the background. If the last holder let it run out, what it had not finished is fenced first, and
    /// that is said. If it is lost, `cancel` is cancelled and [`Leased::explain`] and [`Leased::prove`] say why.
    ///
    /// # Errors
    /// A conflict that names the holder, since when and until when; what the store says. Nothing is changed.
    pub(crate) async fn take(
        catalog: &Catalog,
        scope: LeaseScope,
        operation: Uuid,
        command: &str,
        settings: &Settings,
        printer: &Printer,
        cancel: &CancellationToken,
    ) -> Result<Self> {
        let request = request(scope, operation, None, command, settings);
        Self::taken(catalog, request, printer, cancel).await
    }

    /// [`Leased::take`] of the scope of backups, for the backup `id`: whoever takes over fences it.
    ///
    /// # Errors
    /// As [`Leased::take`].
    pub(crate) async fn take_for_backup(
        catalog: &Catalog,
        id: &BackupId,
        operation: Uuid,
        settings: &Settings,
        printer: &Printer,
        cancel: &CancellationToken,
    ) -> Result<Self> {
        let (scope, id) = (LeaseScope::Backup, Some(id.clone()));
        let request = request(scope, operation, id, "gs_pitr backup", settings);
        Self::taken(catalog, request, printer, cancel).await
    }

    async fn taken(
        catalog: &Catalog,
        request: LeaseRequest,
        printer: &Printer,
        cancel: &CancellationToken,
    ) -> Result<Self> {
        let taken = tokio::select! {
            taken = catalog.take_lease(request) => taken,
            () = cancel.cancelled() => return Err(Failure::cancelled()),
        };
        let Taken { lease, predecessor } = taken?;
        if let Some((predecessor, fenced)) = &predecessor {
            tell(predecessor, fenced, printer);
        }
        let pause = lease.ttl() / RENEWALS;
        let leased = Self {
            held: Arc::new(Mutex::new(Some(lease))),
            lost: Arc::default(),
            stop: CancellationToken::new(),
        };
        let renewing = Renewing {
            held: Arc::clone(&leased.held),
            lost: Arc::clone(&leased.lost),
            printer: printer.clone(),
            cancel: cancel.clone(),
            pause,
        };
        let stop = leased.stop.clone();
        tokio::spawn(async move { stop.run_until_cancelled(renewing.run()).await });
        Ok(leased)
    }

    /// Renews the lease at the store NOW, and so proves that nobody has taken it over: right before every
    /// write that cannot be taken back (manifest, decision, tombstone). What happens between this and that
    /// write, the fence on that write answers.
    ///
    /// # Errors
    /// That it is lost: nothing may be written any more; that the store cannot say.
    pub(crate) async fn prove(&self) -> Result<()> {
        if let Some(lost) = self.lost.get() {
            return Err(lost.clone());
        }
        let mut held = self.held.lock().await;
        let Some(lease) = held.as_mut() else {
            let message = "the lease has been given back already";
            return Err(Failure::new(ErrorKind::Internal, message));
        };
        match timeout(PROOF_WITHIN, lease.renew()).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(error.into()),
            Err(_) => {
                let message =
                    "the store did not confirm our lease in time, so nothing was committed";
                Err(Failure::new(ErrorKind::StoreUnavailable, message))
            }
        }
    }

    /// The failure that a command ends with: if it was cancelled because the lease was lost (by us, or by an agent that the taker told to stop), that is why.
    pub(crate) async fn explain(&self, failure: Failure) -> Failure {
        if failure.kind != ErrorKind::Cancelled {
            return failure;
        }
        match self.prove().await {
            Err(lost) if lost.kind == ErrorKind::Conflict => lost.changed_if(failure.changed),
            _ => failure,
        }
    }

    /// Gives the lease back, at an end that leaves nothing open: what was to be committed stands, or never
    /// will. Otherwise drop it, so that it runs out and the next one fences what is open.
    pub(crate) async fn release(self) {
        self.stop.cancel();
        let release = async {
            match self.held.lock().await.take() {
                Some(lease) => lease.release().await,
                None => Ok(()),
            }
        };
        match timeout(RELEASE_WITHIN, release).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::info!(%error, "the lease was not given back"),
            Err(_) => tracing::info!("the lease was not given back in time"),
        }
    }
}

/// What the background does.
struct Renewing {
    held: Arc<Mutex<Option<HeldLease>>>,
    lost: Arc<OnceLock<Failure>>,
    printer: Printer,
    cancel: CancellationToken,
    pause: Duration,
}

impl Renewing {
    async fn run(self) {
        let mut warned = false;
        loop {
            sleep(self.pause).await;
            let mut held = self.held.lock().await;
            let Some(lease) = held.as_mut() else {
                return;
            };
            let error = match timeout(lease.ttl(), lease.renew()).await {
                Ok(Ok(())) => {
                    warned = false;
                    continue;
                }
                Ok(Err(error @ CatalogError::LeaseLost { .. })) => {
                    let failure = Failure::from(error);
                    self.printer.warning(None, &failure.message);
                    let _ = self.lost.set(failure);
                    self.cancel.cancel();
                    return;
                }
                Ok(Err(error)) => error.to_string(),
                Err(_) => "the store did not answer in time".to_owned(),
            };
            // It goes on: as long as nobody takes the lease over, a late renewal is as good.
            if lease.age() >= lease.ttl() && !std::mem::replace(&mut warned, true) {
                let message = format!(
                    "the lease has run out, because it could not be renewed ({error}); until it is, another may take over"
                );
                self.printer.warning(None, &message);
            }
        }
    }
}

fn request(
    scope: LeaseScope,
    operation: Uuid,
    backup_id: Option<BackupId>,
    command: &str,
    settings: &Settings,
) -> LeaseRequest {
    LeaseRequest {
        scope,
        operation,
        backup_id,
        holder: journalled::ourselves(command),
        ttl: settings.lease_ttl(),
    }
}

/// Says what a predecessor left and what became of it.
fn tell(predecessor: &Lease, fenced: &Fenced, printer: &Printer) {
    let Holder {
        host,
        user,
        pid,
        command,
    } = &predecessor.holder;
    let what = match fenced {
        Fenced::Nothing => "it left nothing that has to be fenced".to_owned(),
        Fenced::Backup(id, Abandoned::Fenced) => {
            format!("its backup {id} was not complete and can never be completed now")
        }
        Fenced::Backup(id, Abandoned::Complete(_)) => format!("its backup {id} is complete"),
        Fenced::Restore(decision) => match decision.verdict {
            Verdict::Commit => {
                "its restore is decided: every node goes forward (gs_pitr operations)".to_owned()
            }
            Verdict::Rollback => {
                "its restore is decided: every node goes back (gs_pitr operations)".to_owned()
            }
        },
    };
    let message = format!(
        "took over from `{command}` of {user}@{host} (pid {pid}, operation {}), whose lease has run out: {what}",
        predecessor.operation
    );
    let (backup, complete, verdict) = match fenced {
        Fenced::Nothing => (None, None, None),
        Fenced::Backup(id, stands) => {
            let complete = matches!(stands, Abandoned::Complete(_));
            (Some(id), Some(complete), None)
        }
        Fenced::Restore(decision) => (None, None, Some(decision.verdict)),
    };
    let fields = json!({
        "scope": predecessor.scope,
        "operation": predecessor.operation,
        "holder": predecessor.holder,
        "backup_id": backup,
        "complete": complete,
        "verdict": verdict,
        "message": message,
    });
    printer.event("took-over", fields, Some(&format!("warning: {message}")));
}
