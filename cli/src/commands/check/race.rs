//! Everybody creates one object at once: one must win, and its bytes must be the ones that stand.

use agent_api::{ErrorKind, Finding, RaceRequest, RaceResult};
use catalog::keys;
use futures_util::future::join_all;
use pipeline::probe::{self, ProbeError};
use pipeline::store::{Key, ObjectStore, StoreError};
use uuid::Uuid;

use super::nodes::Examined;
use super::report::Report;
use super::store::Store;
use crate::failure::Failure;
use crate::repo;
use crate::settings::Settings;

/// Races in all, and creates of each participant in each.
const ROUNDS: u32 = 5;
const CREATES: usize = 4;

const NAME: &str = "store race";

/// Runs all races, with every host whose store can be used.
pub(super) async fn run(
    hosts: &[Examined],
    settings: &Settings,
    store: &Store,
    report: &mut Report,
) {
    let Some(ours) = store.usable() else {
        if store.is_given() {
            report.not_checked("a race to create one object: the store does not do");
        }
        return;
    };
    let hosts: Vec<_> = hosts.iter().filter(|host| host.store_usable).collect();
    for round in 1..=ROUNDS {
        match one(round, &hosts, settings, store.operation(), &**ours).await {
            Ok(None) => {}
            Ok(Some(broken)) => {
                let failure = Failure::new(ErrorKind::StoreDenied, broken)
                    .next("use another store: two operators at once would destroy each other's backups in this one");
                report.failure(None, NAME, failure);
                return;
            }
            Err(failure) => {
                report.failure(None, NAME, failure);
                return;
            }
        }
    }
    let message = format!(
        "{ROUNDS} objects, each created {} times at once from {} hosts: one create of each won",
        CREATES * (hosts.len() + 1),
        hosts.len() + 1
    );
    report.add(None, Finding::fine(NAME, message));
}

/// One race; what was broken, if anything was.
async fn one(
    round: u32,
    hosts: &[&Examined],
    settings: &Settings,
    operation: Uuid,
    ours: &dyn ObjectStore,
) -> Result<Option<String>, Failure> {
    let key = keys::probe(operation, &format!("race-{round}"))
        .map_err(|error| Failure::new(ErrorKind::Internal, error.to_string()))?;
    let bodies = || -> Vec<Uuid> { (0..CREATES).map(|_| Uuid::new_v4()).collect() };
    let mut requests = Vec::new();
    for host in hosts {
        let lend = !host.host.facts.has_credentials;
        requests.push(RaceRequest {
            repository: repo::access(settings, lend).await?,
            operation,
            round,
            bodies: bodies(),
        });
    }
    let theirs = hosts
        .iter()
        .zip(&requests)
        .map(|(host, request)| async move {
            let agent = &host.host.agent;
            let result = agent.client().race(request).await;
            result.map_err(|error| Failure::from(error).on(agent.name()))
        });
    let mine = bodies();
    let (mine, theirs) = tokio::join!(our_part(ours, &key, &mine), join_all(theirs));
    let mut results = vec![mine];
    for result in theirs {
        results.push(result?);
    }
    if let Some(error) = results.iter().find_map(|result| result.errors.first()) {
        let message = format!("a create in the race was not answered: {error}");
        return Err(Failure::new(ErrorKind::StoreUnavailable, message));
    }
    let stands = ours.get(&key, None).await?.collect(&key, 1 << 10).await?;
    Ok(verdict(&results, &String::from_utf8_lossy(&stands)))
}

async fn our_part(store: &dyn ObjectStore, key: &Key, ids: &[Uuid]) -> RaceResult {
    let bodies: Vec<_> = ids.iter().map(ToString::to_string).collect();
    let mut result = RaceResult {
        won: Vec::new(),
        lost: 0,
        errors: Vec::new(),
    };
    for (id, answer) in ids.iter().zip(probe::race(store, key, &bodies).await) {
        match answer {
            Ok(()) => result.won.push(*id),
            Err(ProbeError::Store(StoreError::AlreadyExists(_))) => result.lost += 1,
            Err(error) => result.errors.push(error.to_string()),
        }
    }
    result
}

/// What is wrong with a race whose object reads `stands`.
fn verdict(results: &[RaceResult], stands: &str) -> Option<String> {
    let winners: Vec<String> = results
        .iter()
        .flat_map(|result| &result.won)
        .map(ToString::to_string)
        .collect();
    match winners.as_slice() {
        // A reply may be lost, and its create then be told that the object exists: its own.
        [] => None,
        [winner] if winner == stands => None,
        [_] => Some("one create won a race, and the object has the bytes of another".to_owned()),
        several => Some(format!(
            "{} creates of one object, sent at once with `If-None-Match: *`, all succeeded",
            several.len()
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn won(bodies: &[Uuid]) -> RaceResult {
        RaceResult {
            won: bodies.to_vec(),
            lost: 3,
            errors: Vec::new(),
        }
    }

    #[test]
    fn a_race_has_one_winner_and_its_bytes_stand() {
        let (a, b) = (Uuid::new_v4(), Uuid::new_v4());
        assert_eq!(verdict(&[won(&[]), won(&[a])], &a.to_string()), None);
        assert_eq!(verdict(&[won(&[])], &a.to_string()), None);
        let two = verdict(&[won(&[a]), won(&[b])], &a.to_string()).unwrap();
        assert!(two.contains("2 creates"), "{two}");
        let other = verdict(&[won(&[a])], &b.to_string()).unwrap();
        assert!(other.contains("bytes of another"), "{other}");
    }
}
