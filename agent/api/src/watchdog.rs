//! Watchdogs: an agent that unlocks the cluster when the client that locked it has gone silent.
//!
//! ShardingSphere's lock has no owner and no expiry: whoever takes it and dies leaves the cluster locked. So before `LOCK CLUSTER` is
//! sent, two or three agents are armed with a deadline on their own clocks. One that is not disarmed in time fires: it sends `UNLOCK CLUSTER` through
//! every proxy, again and again, until writes have passed for [`OPEN_WHEN_KNOWN`] (the client has said what became of its `LOCK`) or for
//! [`OPEN_WHEN_UNKNOWN`] (it has not: `LOCK` may land late). A watchdog is armed again only when it is settled.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::repository::Secret;

/// For how long writes must have passed, counted from when the outcome of `LOCK` was told, before a fired watchdog rests.
pub const OPEN_WHEN_KNOWN: Duration = Duration::from_secs(10);
/// For how long, if nobody tells the outcome of `LOCK`.
pub const OPEN_WHEN_UNKNOWN: Duration = Duration::from_mins(1);
/// A watchdog that nobody has asked about for so long is forgotten, its password with it; never one that is armed or fired.
pub const FORGOTTEN_AFTER: Duration = Duration::from_mins(15);
/// Most watchdogs of an agent.
pub const MOST_WATCHDOGS: usize = 16;
/// Most proxies of a watchdog.
pub const MOST_PROXIES: usize = 64;
/// Longest deadline that one is armed with.
pub const LONGEST_DEADLINE: Duration = Duration::from_mins(10);

/// Where a proxy is, as the agent's host reaches it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProxyAddress {
    /// Host name or address.
    pub host: String,
    /// Port.
    pub port: u16,
}

impl fmt::Display for ProxyAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// `POST /v1/watchdogs`: log in to every proxy and stay there. Not armed yet. The same request again finds the same watchdog.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StartWatchdog {
    /// Chosen by the client.
    pub id: Uuid,
    /// Every proxy of the cluster, each once.
    pub proxies: Vec<ProxyAddress>,
    /// Proxy user.
    pub user: String,
    /// Its password; kept in memory, for as long as the watchdog.
    #[serde(default)]
    pub password: Option<Secret>,
    /// Database to log in to.
    #[serde(default = "postgres")]
    pub database: String,
    /// Whether the connections are encrypted.
    #[serde(default)]
    pub tls: WatchdogTls,
}

fn postgres() -> String {
    "postgres".to_owned()
}

/// How a watchdog's connections are encrypted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "tls", rename_all = "kebab-case")]
pub enum WatchdogTls {
    /// Not at all.
    #[default]
    Off,
    /// TLS.
    On {
        /// Authority that the proxies' certificates must be signed by (PEM). `None`: any certificate will do; it is encrypted, but
        /// who is at the other end is not proved.
        #[serde(default)]
        ca_pem: Option<String>,
    },
}

/// `POST /v1/watchdogs/{id}/arm`, before `LOCK CLUSTER` is sent. Refused unless every earlier attempt is settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ArmWatchdog {
    /// Number of the attempt: greater than any before. The same one again, while it is armed, starts its clock anew only if `renew` is set.
    pub attempt: u32,
    /// It fires so many milliseconds after the agent got this request, by the agent's monotonic clock.
    pub deadline_ms: u64,
    /// If it is armed for this attempt, its clock starts anew: a client that holds the lock for longer than a blink shows so that it lives.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub renew: bool,
    /// It is refused while another watchdog of the agent is armed or has fired: that one would take this client's lock off.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub alone: bool,
}

impl ArmWatchdog {
    /// For `attempt`, for so long, beside whoever else there is.
    #[must_use]
    pub fn of(attempt: u32, deadline: Duration) -> Self {
        Self {
            attempt,
            deadline_ms: u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX),
            renew: false,
            alone: false,
        }
    }

    /// The same, but that its clock starts anew if it is armed.
    #[must_use]
    pub fn renewing(self) -> Self {
        Self {
            renew: true,
            ..self
        }
    }

    /// The same, if no other client's watchdog would take the lock off.
    #[must_use]
    pub fn alone(self, alone: bool) -> Self {
        Self { alone, ..self }
    }
}

/// What became of a client's `LOCK CLUSTER`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LockOutcome {
    /// It was never sent.
    NotSent,
    /// A proxy refused it: it has not locked and will not.
    Refused,
    /// It was answered, and the cluster has been seen open again since.
    Released,
    /// Nobody knows: it may still land.
    Unknown,
}

/// `POST /v1/watchdogs/{id}/disarm`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DisarmWatchdog {
    /// The attempt that is over. One that was never armed cannot be armed later: its request may still be on its way.
    pub attempt: u32,
    /// What became of its lock. [`LockOutcome::Unknown`] makes the watchdog fire at once.
    pub lock: LockOutcome,
}

/// Where a watchdog stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum WatchdogState {
    /// Connected; nothing is armed.
    Ready,
    /// It will fire.
    Armed {
        /// The attempt.
        attempt: u32,
        /// In so many milliseconds.
        left_ms: u64,
    },
    /// It unlocks, and looks whether writes pass.
    Fired {
        /// The attempt.
        attempt: u32,
        /// Since so many milliseconds.
        since_ms: u64,
        /// `UNLOCK CLUSTER` was sent so often.
        unlocks: u64,
        /// What went wrong last, at which proxy.
        last_error: Option<String>,
    },
    /// It fired, and its rule was met: it can be armed again.
    Settled {
        /// The attempt.
        attempt: u32,
        /// `UNLOCK CLUSTER` was sent so often.
        unlocks: u64,
        /// So many milliseconds after it fired, writes passed, and have passed since. `None`: it was told that there is no lock of this attempt, or it gave up.
        open_after_ms: Option<u64>,
        /// What went wrong last, at which proxy.
        last_error: Option<String>,
    },
}

impl WatchdogState {
    /// Whether it can be armed, as far as its state goes.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        matches!(self, Self::Ready | Self::Settled { .. })
    }
}

/// A proxy, as a watchdog sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatchedProxy {
    /// Where it is.
    pub address: ProxyAddress,
    /// Whether the watchdog has a session there.
    pub connected: bool,
    /// Whether it refused writes when it was last asked; `None`: it has not answered.
    #[serde(default)]
    pub locked: Option<bool>,
    /// What went wrong there last, unless it went well since.
    #[serde(default)]
    pub error: Option<String>,
}

/// A watchdog as it stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatchdogStatus {
    /// Its id.
    pub id: Uuid,
    /// Where it stands.
    #[serde(flatten)]
    pub state: WatchdogState,
    /// Its proxies, in the order of the request.
    pub proxies: Vec<WatchedProxy>,
    /// The latest attempt that it was armed for, or told of.
    #[serde(default)]
    pub last_attempt: Option<u32>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_keep_their_shape_and_their_secret() {
        let json = r#"{"id":"00000000-0000-0000-0000-000000000001","proxies":[{"host":"::1","port":3307}],"user":"root"}"#;
        let start: StartWatchdog = serde_json::from_str(json).unwrap();
        assert_eq!(start.database, "postgres");
        assert_eq!((start.password, start.tls), (None, WatchdogTls::Off));
        assert_eq!(start.proxies[0].to_string(), "[::1]:3307");

        let with = StartWatchdog {
            id: Uuid::nil(),
            proxies: Vec::new(),
            user: "root".to_owned(),
            password: Some(Secret("hidden".to_owned())),
            database: "postgres".to_owned(),
            tls: WatchdogTls::On { ca_pem: None },
        };
        assert!(!format!("{with:?}").contains("hidden"));
        let again = serde_json::to_string(&with).unwrap();
        assert_eq!(serde_json::from_str::<StartWatchdog>(&again).unwrap(), with);
    }

    #[test]
    fn a_status_is_flat() {
        let status = WatchdogStatus {
            id: Uuid::nil(),
            state: WatchdogState::Armed {
                attempt: 2,
                left_ms: 1500,
            },
            proxies: Vec::new(),
            last_attempt: Some(2),
        };
        let json = serde_json::to_value(&status).unwrap();
        assert_eq!(json["state"], "armed");
        assert_eq!(json["left_ms"], 1500);
        assert_eq!(
            serde_json::from_value::<WatchdogStatus>(json).unwrap(),
            status
        );
        assert!(!status.state.is_quiet());
    }
}
