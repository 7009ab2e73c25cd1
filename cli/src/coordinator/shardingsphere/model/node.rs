//! A data node.

use std::rc::Rc;
use std::time::Duration;

use agent_api::{ApiError, ErrorKind, Look, MarkResult, Observed, XidHolder, XidHolders};
use jiff::Timestamp;

use super::Without;
use super::time::{now, sleep};
use super::world::World;
use crate::coordinator::proof::Node;

pub(super) struct ModelNode {
    pub(super) number: usize,
    pub(super) world: Rc<World>,
    pub(super) without: Without,
}

impl ModelNode {
    /// Whether agent and database are there, and know of the copy.
    fn answers(&self) -> Result<(), ApiError> {
        if self.number == 0 && self.world.forgot.get().is_some() {
            return Err(ApiError::new(ErrorKind::NotFound, "no such operation"));
        }
        if self.world.nodes.borrow()[self.number].is_down() {
            return Err(ApiError::new(ErrorKind::Database, "no connection").passing());
        }
        Ok(())
    }

    async fn look(&self, look: Look) -> Observed {
        let holders_first = look == Look::HoldersThenSnapshot;
        let holders = matches!(look, Look::Holders | Look::HoldersThenSnapshot).then(|| {
            let nodes = self.world.nodes.borrow();
            let holders = nodes[self.number].holders.values();
            let oldest: Vec<_> = holders
                .map(|since| holder(now().saturating_sub(*since)))
                .collect();
            XidHolders {
                total: oldest.len() as u64,
                oldest,
            }
        });
        if holders_first {
            sleep(self.world.between(0, 2)).await;
        }
        let snapshot = (look != Look::Holders).then(|| {
            let ended = self.world.nodes.borrow()[self.number].ended;
            if self.without == Without::Proof {
                String::new()
            } else {
                ended.to_string()
            }
        });
        Observed {
            holders,
            snapshot,
            session: self.world.nodes.borrow()[self.number].crashes,
            at: Timestamp::UNIX_EPOCH,
            took_us: 0,
        }
    }
}

fn holder(age: Duration) -> XidHolder {
    XidHolder {
        pid: Some(1),
        application: None,
        state: None,
        database: None,
        age_ms: u64::try_from(age.as_millis()).ok(),
        prepared: None,
    }
}

impl Node for ModelNode {
    fn name(&self) -> String {
        format!("node{}", self.number)
    }

    async fn observe(&self, look: Look) -> Result<Observed, ApiError> {
        self.world.step().await;
        sleep(self.world.travel()).await;
        self.answers()?;
        let seen = self.look(look).await;
        self.answers()?;
        sleep(self.world.travel()).await;
        self.world.step().await;
        Ok(seen)
    }

    async fn mark(&self, restore_point: String) -> Result<MarkResult, ApiError> {
        self.world.step().await;
        sleep(self.world.travel()).await;
        self.answers()?;
        self.world.mark(self.number, &restore_point);
        sleep(self.world.travel()).await;
        self.world.step().await;
        Ok(MarkResult {
            restore_point,
            end_lsn: String::new(),
            timeline: 1,
            made: Timestamp::UNIX_EPOCH,
        })
    }

    async fn flush(&self, restore_point: String) -> Result<(), ApiError> {
        if self.without == Without::Flush {
            return Ok(());
        }
        self.world.step().await;
        if self.world.flushed(self.number, &restore_point).await {
            return Ok(());
        }
        Err(ApiError::new(ErrorKind::Database, "it may be lost").passing())
    }

    async fn lost(&self) -> Option<ApiError> {
        let forgot = self.number == 0 && self.world.forgot.get().is_some();
        forgot.then(|| ApiError::new(ErrorKind::AgentUnreachable, "it was restarted"))
    }
}
