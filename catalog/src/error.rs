//! Why the catalog cannot say or keep something, by what the caller can do about it.

use std::fmt;
use std::io;
use std::path::PathBuf;

use jiff::Timestamp;
use pipeline::error::PipelineError;
use pipeline::store::{Key, StoreError};
use uuid::Uuid;

use crate::ids::InvalidId;
use crate::model::{Holder, Lease, LeaseScope};

/// Why the catalog cannot say or keep something.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// The store failed or refused. Its own words say which key.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The way to or from the store failed otherwise: cancelled, too slow, a budget too small.
    #[error(transparent)]
    Pipeline(PipelineError),
    /// There is no repository where one was looked for.
    #[error("there is no repository at {store}")]
    NoRepository {
        /// The store in a person's words.
        store: String,
    },
    /// The object was written by a newer program, in a format that this one would misread.
    #[error("`{key}` has format {major}, this program reads up to {supported}: use a newer one")]
    NewerFormat {
        /// The object.
        key: String,
        /// Its major format.
        major: u64,
        /// The newest that this program reads.
        supported: u32,
    },
    /// The stored bytes are not what a writer of this format wrote.
    #[error("`{key}` is damaged: {what}")]
    Damaged {
        /// The object.
        key: String,
        /// What is wrong with it.
        what: String,
    },
    /// Nothing of that name.
    #[error("no {what} `{id}`{}", Nearest(nearest))]
    NotFound {
        /// `backup`, `point`, `node`, ...
        what: &'static str,
        /// The name that was asked for.
        id: String,
        /// Names that look like it, best first.
        nearest: Vec<String>,
    },
    /// The backup was deleted: it has a tombstone, whatever is left of it.
    #[error("backup `{id}` was deleted")]
    Deleted {
        /// The backup.
        id: String,
    },
    /// The manifest is a fence: the backup was given up before it was complete.
    #[error("backup `{id}` was abandoned before it was complete")]
    Abandoned {
        /// The backup.
        id: String,
    },
    /// There is an object of that name with other content. It stays as it is.
    #[error("`{key}` exists with other content: {what}")]
    Conflict {
        /// The object.
        key: String,
        /// How it differs.
        what: String,
    },
    /// More than one answer.
    #[error("{what} `{text}` is ambiguous: {}", candidates.join(", "))]
    Ambiguous {
        /// `backup`, `node`, ...
        what: &'static str,
        /// The name that was asked for.
        text: String,
        /// Everything it may mean.
        candidates: Vec<String>,
    },
    /// Somebody else operates.
    #[error("{}", refusal(*scope, held, until))]
    Leased {
        /// What the lease is about.
        scope: LeaseScope,
        /// The lease that is in the way.
        held: Box<Lease>,
        /// When it ends unless it is renewed, by the store's clock.
        until: Timestamp,
    },
    /// The lease that was ours is somebody else's, or has been given back. Whoever took it over has fenced
    /// what we had not finished.
    #[error("{}", loss(*scope, taker.as_deref()))]
    LeaseLost {
        /// What the lease was about.
        scope: LeaseScope,
        /// The lease that is there instead.
        taker: Option<Box<Lease>>,
    },
    /// An operation that is under way reads this backup.
    #[error("backup `{id}` is read by {} `{operation}`", scope.name())]
    Pinned {
        /// The backup.
        id: String,
        /// What the reader does: restore, or backup (an increment on it).
        scope: LeaseScope,
        /// The operation that reads it.
        operation: Uuid,
    },
    /// What the caller wants to write breaks a rule of the format. Nothing was written.
    #[error("refused to write `{key}`: {what}")]
    Refused {
        /// The object.
        key: String,
        /// The rule.
        what: String,
    },
    /// A string that is not an id of its kind.
    #[error(transparent)]
    InvalidId(#[from] InvalidId),
    /// The file that was to be stored cannot be read. Nothing of it was stored.
    #[error("reading what is to be `{key}`: {source}")]
    Source {
        /// The object.
        key: String,
        /// Why.
        source: io::Error,
    },
    /// The place that verified bytes were to be written to failed. The bucket is not concerned.
    #[error("writing the bytes of `{key}`: {source}")]
    Sink {
        /// The object.
        key: String,
        /// Why.
        source: io::Error,
    },
    /// The local mirror cannot be read or written. The bucket is not concerned.
    #[error("local mirror `{}`: {source}", path.display())]
    Mirror {
        /// File or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl CatalogError {
    pub(crate) fn damaged(key: &Key, what: impl Into<String>) -> Self {
        Self::Damaged {
            key: key.as_str().to_owned(),
            what: what.into(),
        }
    }

    pub(crate) fn conflict(key: &Key, what: impl Into<String>) -> Self {
        Self::Conflict {
            key: key.as_str().to_owned(),
            what: what.into(),
        }
    }

    pub(crate) fn refused(key: &Key, what: impl Into<String>) -> Self {
        Self::Refused {
            key: key.as_str().to_owned(),
            what: what.into(),
        }
    }

    pub(crate) fn source(key: &Key, source: io::Error) -> Self {
        Self::Source {
            key: key.as_str().to_owned(),
            source,
        }
    }

    pub(crate) fn sink(key: &Key, source: io::Error) -> Self {
        Self::Sink {
            key: key.as_str().to_owned(),
            source,
        }
    }

    /// Whether the object that was asked for is proved not to be there.
    #[must_use]
    pub fn is_absent(&self) -> bool {
        matches!(
            self,
            Self::NotFound { .. } | Self::Store(StoreError::NotFound(_))
        )
    }

    /// Whether this says something of one stored object (so that a listing can go on without it),
    /// rather than of the store or the caller.
    #[must_use]
    pub fn is_of_object(&self) -> bool {
        matches!(
            self,
            Self::Damaged { .. }
                | Self::NewerFormat { .. }
                | Self::NotFound { .. }
                | Self::Store(StoreError::NotFound(_) | StoreError::Corrupt(_))
        )
    }
}

impl From<PipelineError> for CatalogError {
    fn from(error: PipelineError) -> Self {
        match error {
            PipelineError::Store(error) => Self::Store(error),
            PipelineError::Damaged { key, what } => Self::Damaged { key, what },
            other => Self::Pipeline(other),
        }
    }
}

struct Nearest<'a>(&'a [String]);

impl fmt::Display for Nearest<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            [] => Ok(()),
            names => write!(f, " (nearest: {})", names.join(", ")),
        }
    }
}

fn who(holder: &Holder) -> String {
    let Holder {
        host,
        user,
        pid,
        command,
    } = holder;
    format!("{user}@{host} (pid {pid}, `{command}`)")
}

fn second(at: &Timestamp) -> impl fmt::Display {
    at.strftime("%FT%TZ")
}

/// Who holds a lease, since when, until when.
fn refusal(scope: LeaseScope, held: &Lease, until: &Timestamp) -> String {
    format!(
        "the {} lease is held by {}, operation {}, since {}, until {} unless it is renewed",
        scope.name(),
        who(&held.holder),
        held.operation,
        second(&held.taken),
        second(until),
    )
}

/// Who has a lease instead of us.
fn loss(scope: LeaseScope, taker: Option<&Lease>) -> String {
    let scope = scope.name();
    match taker {
        Some(taker) => format!(
            "the {scope} lease ran out and was taken over by {}, operation {}, at {}",
            who(&taker.holder),
            taker.operation,
            second(&taker.taken),
        ),
        None => format!("the {scope} lease ran out and what it was for has been fenced or removed"),
    }
}
