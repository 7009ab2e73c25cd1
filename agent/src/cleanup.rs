//! What a killed agent left: taken away when the agent starts again, and told to the next client.
//!
//! A mount is detached by [`life::detach_dead`](crate::catalog_fs::life::detach_dead). In the database, backup mode
//! ends with its session, which the server ends when its client is gone. A slot stays, and holds back WAL until the disk is full. The database need not be there when the agent starts, so the look is
//! repeated until it has succeeded; and every backup looks again before it begins.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::config::Config;
use crate::engine::slot::{self, Swept};
use crate::wal::service::WalService;

/// How long one look may take.
const LOOK: Duration = Duration::from_secs(10);
/// Pause before the next one.
const PAUSE: Duration = Duration::from_secs(2);

/// What was taken away and nobody has been told of yet. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Cleanup {
    untold: Arc<Mutex<Vec<String>>>,
}

/// How it is said that a slot was dropped.
#[must_use]
pub fn dropped(slot: &str) -> String {
    format!("dropped the replication slot `{slot}`, which was left when an agent was killed")
}

impl Cleanup {
    /// Looks once, at most 10 s; if the database does not answer, or a dead backup's session has not ended yet,
    /// goes on looking in the background.
    pub async fn begin(&self, config: &Arc<Config>, service: &WalService) {
        let mut told = false;
        if self.look(config, service, &mut told).await {
            return;
        }
        let (this, config, service) = (self.clone(), Arc::clone(config), service.clone());
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(PAUSE).await;
                if this.look(&config, &service, &mut told).await {
                    return;
                }
            }
        });
    }

    /// Notes what was taken away elsewhere.
    pub fn tell(&self, what: String) {
        let mut untold = self.untold.lock().unwrap_or_else(PoisonError::into_inner);
        untold.push(what);
    }

    /// What was taken away since the last time somebody was told.
    #[must_use]
    pub fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.untold.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether nothing is left. What stands in the way is logged once.
    async fn look(&self, config: &Config, service: &WalService, told: &mut bool) -> bool {
        let swept = tokio::time::timeout(LOOK, slot::sweep(config, service)).await;
        let why = match swept {
            Ok(Ok(swept)) => match self.note(&swept) {
                None => return true,
                Some(in_use) => in_use,
            },
            Ok(Err(error)) => error.to_string(),
            Err(_) => "the database does not answer".to_owned(),
        };
        if !*told {
            tracing::warn!(
                "did not finish looking for slots that a killed agent left, goes on: {why}"
            );
            *told = true;
        }
        false
    }

    /// Notes what was dropped; says what is still in use.
    fn note(&self, swept: &Swept) -> Option<String> {
        let mut untold = self.untold.lock().unwrap_or_else(PoisonError::into_inner);
        untold.extend(swept.dropped.iter().map(|slot| dropped(slot)));
        let in_use = swept.in_use.join(", ");
        (!in_use.is_empty()).then(|| format!("a session of its backup lives: {in_use}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_slot_is_told_once() {
        let cleanup = Cleanup::default();
        let swept = Swept {
            dropped: vec!["gs_pitr_01234567".to_owned()],
            in_use: Vec::new(),
        };
        assert_eq!(cleanup.note(&swept), None);
        let shared = cleanup.clone();
        let told = shared.take();
        assert!(
            told.len() == 1 && told[0].contains("gs_pitr_01234567"),
            "{told:?}"
        );
        assert!(cleanup.take().is_empty());
        let busy = Swept {
            dropped: Vec::new(),
            in_use: vec!["gs_pitr_89abcdef".to_owned()],
        };
        assert!(cleanup.note(&busy).unwrap().contains("gs_pitr_89abcdef"));
        assert!(cleanup.take().is_empty());
    }
}
