//! Attempts, pauses, deadlines: which calls are repeated, and what is said when that did not help.

use std::future::Future;
use std::time::Duration;

use rand::RngExt as _;

use super::credentials::Provider;
use super::failure::{Failure, Fate, Subject};
use crate::store::StoreError;

/// What repeating a call can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Effect {
    /// The same as doing it once: reads, parts, deletes.
    Repeatable,
    /// No harm, but the answer to a repetition does not tell who wrote: conditional writes.
    Conditional,
    /// Each time something new is left in the store: never repeated once it may have been taken.
    Once,
}

/// How often and how long. See the fields of `S3Config`.
#[derive(Debug, Clone)]
pub(super) struct Policy {
    pub(super) attempts: u32,
    pub(super) first_pause: Duration,
    pub(super) longest_pause: Duration,
}

impl Policy {
    /// Makes attempts of at most `deadline` each until one succeeds or trying again cannot help.
    pub(super) async fn run<T, F, A>(
        &self,
        subject: Subject<'_>,
        effect: Effect,
        deadline: Duration,
        keys: &Provider,
        attempt: A,
    ) -> Result<T, StoreError>
    where
        A: Fn() -> F,
        F: Future<Output = Result<T, Failure>>,
    {
        let mut lost = false;
        let mut renewed = false;
        let mut number = 0;
        loop {
            number += 1;
            let failure = match tokio::time::timeout(deadline, attempt()).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(failure)) => failure,
                Err(_) => subject.late(deadline.as_secs_f64()),
            };
            lost |= failure.fate == Fate::Lost;
            let again = match failure.fate {
                Fate::Final => false,
                // The first refusal may be of keys that were changed a moment ago.
                Fate::StaleKeys => !std::mem::replace(&mut renewed, true) && keys.renew().await,
                Fate::Lost if effect == Effect::Once => false,
                Fate::Lost | Fate::NotTaken | Fate::Throttled => number < self.attempts,
            };
            if !again {
                return Err(verdict(failure, effect, lost, number));
            }
            let pause = self.pause(number);
            tracing::debug!(error = %failure.error, ?pause, attempt = number, "trying again");
            tokio::time::sleep(pause).await;
        }
    }

    /// Full jitter under a doubling limit, so that many parts refused at once do not come back at once.
    fn pause(&self, number: u32) -> Duration {
        let limit = self
            .first_pause
            .saturating_mul(1 << number.min(16).saturating_sub(1))
            .min(self.longest_pause);
        limit.mul_f64(rand::rng().random_range(0.5..1.0))
    }
}

/// The error to report: what the store said last, unless an earlier attempt may have been taken.
fn verdict(failure: Failure, effect: Effect, lost: bool, attempts: u32) -> StoreError {
    let mut error = failure.error;
    if attempts > 1 {
        annotate(&mut error, &format!(" (after {attempts} attempts)"));
    }
    // The documented answers of a conditional write already say "read back".
    let told = matches!(
        error,
        StoreError::AlreadyExists(_) | StoreError::NotFound(_)
    );
    if lost && effect != Effect::Repeatable && !told {
        return StoreError::UnknownOutcome(Box::new(error.detail().clone()));
    }
    error
}

fn annotate(error: &mut StoreError, words: &str) {
    use StoreError as E;
    match error {
        E::NotFound(detail)
        | E::NoSuchBucket(detail)
        | E::AlreadyExists(detail)
        | E::PermissionDenied(detail)
        | E::Unauthenticated(detail)
        | E::Invalid(detail)
        | E::Throttled(detail)
        | E::Unavailable(detail)
        | E::UnknownOutcome(detail)
        | E::Corrupt(detail) => detail.message.push_str(words),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::store::s3::CredentialSource;

    const SUBJECT: Subject<'static> = Subject {
        operation: "put",
        key: "k",
    };

    fn policy() -> Policy {
        Policy {
            attempts: 3,
            first_pause: Duration::from_millis(1),
            longest_pause: Duration::from_millis(2),
        }
    }

    fn fail(fate: Fate) -> Failure {
        let make = match fate {
            Fate::Final => StoreError::AlreadyExists,
            Fate::Throttled => StoreError::Throttled,
            _ => StoreError::Unavailable,
        };
        Failure {
            fate,
            error: make(SUBJECT.detail("words")),
        }
    }

    /// Runs a call whose attempts fail as `fates` say; the number of attempts is returned too.
    async fn run(effect: Effect, fates: &[Fate]) -> (Result<(), StoreError>, usize) {
        let keys = Provider::new(CredentialSource::Environment);
        let left = Mutex::new(fates.iter().copied());
        let made = Mutex::new(0);
        let result = policy()
            .run(SUBJECT, effect, Duration::from_secs(5), &keys, || async {
                *made.lock().unwrap() += 1;
                left.lock()
                    .unwrap()
                    .next()
                    .map_or(Ok(()), |fate| Err(fail(fate)))
            })
            .await;
        let made = *made.lock().unwrap();
        (result, made)
    }

    #[tokio::test]
    async fn what_may_have_been_taken_is_never_called_untaken() {
        let (result, made) = run(
            Effect::Conditional,
            &[Fate::Lost, Fate::NotTaken, Fate::NotTaken],
        )
        .await;
        assert!(
            matches!(result, Err(StoreError::UnknownOutcome(_))),
            "{result:?}"
        );
        assert_eq!(made, 3);
        let (result, _) = run(Effect::Conditional, &[Fate::NotTaken; 3]).await;
        assert!(
            matches!(result, Err(StoreError::Unavailable(_))),
            "{result:?}"
        );
    }

    #[tokio::test]
    async fn a_refusal_after_a_lost_reply_is_passed_on() {
        let (result, made) = run(Effect::Conditional, &[Fate::Lost, Fate::Final]).await;
        assert!(
            matches!(result, Err(StoreError::AlreadyExists(_))),
            "{result:?}"
        );
        assert_eq!(made, 2);
    }

    #[tokio::test]
    async fn what_leaves_something_each_time_is_not_repeated_after_a_lost_reply() {
        let (result, made) = run(Effect::Once, &[Fate::Lost]).await;
        assert!(
            matches!(result, Err(StoreError::UnknownOutcome(_))),
            "{result:?}"
        );
        assert_eq!(made, 1);
        let (result, made) = run(Effect::Once, &[Fate::Throttled]).await;
        assert!(result.is_ok());
        assert_eq!(made, 2);
    }

    #[tokio::test]
    async fn reads_are_repeated_and_then_unavailable() {
        let (result, made) = run(Effect::Repeatable, &[Fate::Lost; 5]).await;
        assert!(
            matches!(result, Err(StoreError::Unavailable(_))),
            "{result:?}"
        );
        assert_eq!(made, 3);
    }
}
