//! What is in the way of a proof, in words. Statements are never told: they may hold what nobody should see.

use std::fmt;

use agent_api::{ApiError, ErrorKind, XidHolder};

/// More transactions than this are not named one by one.
const NAMED: usize = 5;
/// Longest name of an application, identifier or owner that is told whole, in characters.
const LONGEST: usize = 200;

/// A transaction on a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holding {
    /// The node.
    pub node: String,
    /// The transaction.
    pub holder: XidHolder,
}

/// What is in the way.
#[derive(Debug, Clone)]
pub enum Obstacle {
    /// Transactions that hold an id.
    Held {
        /// Which.
        holding: Vec<Holding>,
        /// Whether one of them has for long.
        for_long: bool,
    },
    /// Transactions ended while the restore points were made.
    Moved {
        /// Where.
        nodes: Vec<String>,
    },
    /// Other transactions were in doubt after the restore points than before.
    Doubtful,
    /// An agent had to log in again while the restore points were made.
    SessionLost {
        /// Where.
        node: String,
    },
    /// A request failed.
    Failed {
        /// Where.
        node: String,
        /// How.
        error: ApiError,
    },
    /// What waited for a restore point is no more: its agent was restarted, or it has ended.
    Lost {
        /// Where.
        node: String,
        /// Why.
        error: ApiError,
    },
}

impl Obstacle {
    /// An agent answered something else than it was asked for.
    pub(super) fn misunderstood(node: String) -> Self {
        let message = "the agent's answer is not about what it was asked for";
        let error = ApiError::new(ErrorKind::Incompatible, message);
        Self::Failed { node, error }
    }

    /// Whether it is nothing of the cluster's, but a request that failed.
    #[must_use]
    pub fn is_failure(&self) -> bool {
        matches!(self, Self::Failed { .. } | Self::Lost { .. })
    }

    /// Whether it will hardly be gone in a moment.
    #[must_use]
    pub fn is_for_long(&self) -> bool {
        match self {
            Self::Held { for_long, .. } => *for_long,
            Self::Moved { .. } | Self::Doubtful => false,
            Self::SessionLost { .. } | Self::Failed { .. } | Self::Lost { .. } => true,
        }
    }

    /// Whether a prepared transaction is in the way.
    #[must_use]
    pub fn has_prepared(&self) -> bool {
        let Self::Held { holding, .. } = self else {
            return false;
        };
        holding.iter().any(|held| held.holder.prepared.is_some())
    }

    /// The node it is on, if it is on one only.
    #[must_use]
    pub fn node(&self) -> Option<&str> {
        match self {
            Self::Held { holding, .. } => {
                let first = holding.first()?;
                let all = holding.iter().all(|held| held.node == first.node);
                all.then_some(first.node.as_str())
            }
            Self::Moved { nodes } => match nodes.as_slice() {
                [node] => Some(node),
                _ => None,
            },
            Self::SessionLost { node } | Self::Failed { node, .. } | Self::Lost { node, .. } => {
                Some(node)
            }
            Self::Doubtful => None,
        }
    }
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Held { holding, .. } => {
                for (place, held) in holding.iter().take(NAMED).enumerate() {
                    let before = if place == 0 { "" } else { "; " };
                    write!(f, "{before}{held}")?;
                }
                match holding.len().checked_sub(NAMED) {
                    None | Some(0) => Ok(()),
                    Some(more) => write!(f, "; and {more} more"),
                }
            }
            Self::Moved { nodes } => write!(
                f,
                "transactions ended on {} while the restore points were made",
                nodes.join(", ")
            ),
            Self::Doubtful => {
                f.write_str("other transactions were in doubt after the restore points than before")
            }
            Self::SessionLost { node } => {
                write!(f, "the agent at {node} lost its session with the database")
            }
            Self::Failed { node, error } | Self::Lost { node, error } => {
                write!(f, "{node}: {error}")
            }
        }
    }
}

impl fmt::Display for Holding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let XidHolder {
            pid,
            application,
            state,
            database,
            age_ms,
            prepared,
        } = &self.holder;
        write!(f, "{}: ", self.node)?;
        let (mut about, verb) = match (prepared, pid) {
            (Some(prepared), _) => {
                write!(f, "the transaction `{}`", printable(&prepared.gid))?;
                let owner = format!("owner `{}`", printable(&prepared.owner));
                (vec![owner], "has been prepared")
            }
            (None, Some(pid)) => {
                write!(f, "process {pid}")?;
                let name = application.as_deref().unwrap_or_default();
                let application = format!("application `{}`", printable(name));
                (vec![application], "has held a transaction id")
            }
            (None, None) => {
                f.write_str("a prepared transaction")?;
                (Vec::new(), "is being ended")
            }
        };
        about.extend(
            database
                .iter()
                .map(|name| format!("database `{}`", printable(name))),
        );
        about.extend(state.iter().map(|state| printable(state)));
        if !about.is_empty() {
            write!(f, " ({})", about.join(", "))?;
        }
        match age_ms {
            Some(age) => write!(f, " {verb} for {}.{} s", age / 1000, age % 1000 / 100),
            None => write!(f, " {verb}, for an unknown time"),
        }
    }
}

/// Names are others' words: nothing in them may act on a terminal, or fill it.
pub(crate) fn printable(text: &str) -> String {
    let printable = text.chars().map(|c| if c.is_control() { '?' } else { c });
    printable.take(LONGEST).collect()
}

#[cfg(test)]
mod tests {
    use agent_api::PreparedAs;

    use super::*;

    fn holding(holder: XidHolder) -> Holding {
        let node = "db1:18080".to_owned();
        Holding { node, holder }
    }

    fn session() -> XidHolder {
        XidHolder {
            pid: Some(4711),
            application: Some("shop\u{1b}[2J".into()),
            state: Some("idle in transaction".into()),
            database: Some("orders".into()),
            age_ms: Some(12_345),
            prepared: None,
        }
    }

    #[test]
    fn who_holds_an_id_is_named_and_nothing_reaches_the_terminal() {
        assert_eq!(
            holding(session()).to_string(),
            "db1:18080: process 4711 (application `shop?[2J`, database `orders`, idle in transaction) \
             has held a transaction id for 12.3 s"
        );
        let hidden = XidHolder {
            application: None,
            state: None,
            database: None,
            age_ms: None,
            ..session()
        };
        assert_eq!(
            holding(hidden).to_string(),
            "db1:18080: process 4711 (application ``) has held a transaction id, for an unknown time"
        );
        let prepared = XidHolder {
            pid: None,
            application: None,
            state: None,
            age_ms: Some(7_000),
            prepared: Some(PreparedAs {
                gid: "t-1".into(),
                owner: "app".into(),
            }),
            ..session()
        };
        assert_eq!(
            holding(prepared).to_string(),
            "db1:18080: the transaction `t-1` (owner `app`, database `orders`) has been prepared for 7.0 s"
        );
    }

    #[test]
    fn a_crowd_is_counted() {
        let crowd = Obstacle::Held {
            holding: vec![holding(session()); 8],
            for_long: false,
        };
        let words = crowd.to_string();
        assert_eq!(words.matches("4711").count(), NAMED, "{words}");
        assert!(words.ends_with("; and 3 more"), "{words}");
        assert_eq!(crowd.node(), Some("db1:18080"));
    }
}
