//! Will a backup and a restore of this node work? Looks at everything, changes nothing but probe objects in the
//! bucket, and says of each thing that stands in the way which line mends it.

use std::sync::Arc;

use agent_api::{ApiError, CheckReport, CheckRequest, ErrorKind, RaceRequest, RaceResult};

use crate::config::Config;

mod host;
mod node;
mod store;

/// What a check is made with.
#[derive(Debug, Clone)]
pub struct Checker {
    /// The agent's settings.
    pub config: Arc<Config>,
    /// Slots of operations that run: they are not left over.
    pub slots_in_use: Vec<String>,
}

impl Checker {
    /// Looks at node and store at the same time. Goes on to its end when the caller goes away, so that no probe is
    /// left half done.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for a request that cannot be meant. What is found is no error.
    pub async fn check(self, request: CheckRequest) -> Result<CheckReport, ApiError> {
        store::check_name(&request.participant)?;
        let work = tokio::spawn(async move {
            let (mut findings, store) = tokio::join!(
                node::check(&self.config, &self.slots_in_use),
                store::check(&self.config, &request)
            );
            findings.extend(store.findings);
            CheckReport {
                findings,
                store_usable: store.usable,
            }
        });
        work.await.map_err(internal)
    }

    /// Takes part in a race to create an object.
    ///
    /// # Errors
    /// As [`Checker::check`]; what opening the store says.
    pub async fn race(self, request: RaceRequest) -> Result<RaceResult, ApiError> {
        let work = tokio::spawn(async move { store::race(&self.config, &request).await });
        work.await.map_err(internal)?
    }
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn internal(error: tokio::task::JoinError) -> ApiError {
    let message = format!("a bug in the agent: the check ended: {error}");
    ApiError::new(ErrorKind::Internal, message)
}
