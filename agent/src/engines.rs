//! The engines that the agent runs.

use std::sync::Arc;

use agent_api::{ApiError, BackupSpec, PointSpec, RepositoryAccess, RestoreSpec};
use futures_util::future::BoxFuture;
use pipeline::store::ObjectStore;
use tokio::sync::mpsc;

use crate::cleanup::Cleanup;
use crate::config::OwnCredentials;
use crate::operation::table::Engines;
use crate::operation::{BackupCommand, OperationContext, RestoreCommand};
use crate::{engine, restore, store_access};

/// Backups, points and restores of the node beside the agent.
#[derive(Debug)]
pub struct RealEngines {
    /// The agent's own S3 credentials.
    pub credentials: Option<OwnCredentials>,
    /// What was taken away at the agent's start, for the next client.
    pub cleanup: Cleanup,
}

impl Engines for RealEngines {
    fn store(&self, access: &RepositoryAccess) -> Result<Arc<dyn ObjectStore>, ApiError> {
        store_access::open(access, self.credentials.as_ref())
    }

    fn backup(
        &self,
        cx: OperationContext,
        spec: BackupSpec,
        commands: mpsc::Receiver<BackupCommand>,
    ) -> BoxFuture<'static, Result<(), ApiError>> {
        for told in self.cleanup.take() {
            cx.report.warning(told);
        }
        Box::pin(engine::run(cx, spec, commands))
    }

    fn point(
        &self,
        cx: OperationContext,
        spec: PointSpec,
        commands: mpsc::Receiver<BackupCommand>,
    ) -> BoxFuture<'static, Result<(), ApiError>> {
        Box::pin(engine::run_point(cx, spec, commands))
    }

    fn restore(
        &self,
        cx: OperationContext,
        spec: RestoreSpec,
        commands: mpsc::Receiver<RestoreCommand>,
    ) -> BoxFuture<'static, Result<(), ApiError>> {
        Box::pin(restore::run(cx, spec, commands))
    }
}
