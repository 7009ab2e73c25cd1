//! What ran: the journals of all operations.

use std::collections::BTreeMap;

use jiff::Timestamp;
use uuid::Uuid;

use super::{Catalog, in_parallel, nearest};
use crate::error::CatalogError;
use crate::ids::BackupId;
use crate::journal;
use crate::keys;
use crate::model::{Holder, OperationEvent, OperationRecord, PromotedNode, RestorePlan};

/// An operation with everything that its journal says.
#[derive(Debug, Clone)]
pub struct JournalledOperation {
    /// Its id.
    pub operation: Uuid,
    /// Its records, in order. The first one may be missing: then the operation is of a process that
    /// was killed while it wrote it, or the records are another's.
    pub records: Vec<OperationRecord>,
}

impl JournalledOperation {
    fn events(&self) -> impl DoubleEndedIterator<Item = &OperationEvent> {
        self.records.iter().map(|record| &record.event)
    }

    /// `backup`, `restore`, ...; `None` if its first record is missing.
    #[must_use]
    pub fn kind(&self) -> Option<&str> {
        self.events().find_map(|event| match event {
            OperationEvent::Started { kind, .. } => Some(kind.as_str()),
            _ => None,
        })
    }

    /// Whether it is one agent's part of an operator's operation.
    #[must_use]
    pub fn is_part(&self) -> bool {
        self.events().any(|event| {
            let of_node = |node: &Option<Uuid>| node.is_some();
            matches!(event, OperationEvent::Started { node_id, .. } if of_node(node_id))
        })
    }

    /// Who runs or ran it, where that is known.
    #[must_use]
    pub fn by(&self) -> Option<&Holder> {
        self.events().find_map(|event| match event {
            OperationEvent::Started { by, .. } => by.as_ref(),
            _ => None,
        })
    }

    /// The backup that it makes or reads.
    #[must_use]
    pub fn backup(&self) -> Option<&BackupId> {
        self.events().find_map(|event| match event {
            OperationEvent::Started { backup_id, .. } => backup_id.as_ref(),
            _ => None,
        })
    }

    /// What it will do, if it is a restore and has come so far.
    #[must_use]
    pub fn plan(&self) -> Option<&RestorePlan> {
        self.events().find_map(|event| match event {
            OperationEvent::RestorePlanned(plan) => Some(plan),
            _ => None,
        })
    }

    /// The nodes that it has promoted.
    pub fn promoted(&self) -> impl Iterator<Item = &PromotedNode> {
        self.events().filter_map(|event| match event {
            OperationEvent::NodePromoted(node) => Some(node),
            _ => None,
        })
    }

    /// The nodes that its operator has given up.
    pub fn given_up(&self) -> impl Iterator<Item = Uuid> {
        self.events().filter_map(|event| match event {
            OperationEvent::NodeGivenUp { node_id } => Some(*node_id),
            _ => None,
        })
    }

    /// Since when it may hold the lock of the sharding cluster (UTC). `None`: it does not, as far as it has said.
    #[must_use]
    pub fn may_lock_since(&self) -> Option<Timestamp> {
        let last = self
            .records
            .iter()
            .rev()
            .find_map(|record| match record.event {
                OperationEvent::LockIntended { .. } => Some(Some(record.at)),
                OperationEvent::LockEnded { open, .. } => open.then_some(None),
                _ => None,
            });
        last.flatten()
    }

    /// How it has ended: well, or why not. `None`: it has not.
    #[must_use]
    pub fn ended(&self) -> Option<Option<&str>> {
        self.events().rev().find_map(|event| match event {
            OperationEvent::Ended { error } => Some(error.as_deref()),
            _ => None,
        })
    }
}

impl Catalog {
    /// The operations that have a journal, the oldest first, each with whether something is decided
    /// of it.
    ///
    /// # Errors
    /// [`CatalogError::Store`].
    pub async fn operation_ids(&self) -> Result<BTreeMap<Uuid, bool>, CatalogError> {
        let mut found = BTreeMap::new();
        for object in self.list(keys::OPERATIONS).await? {
            let rest = object.key.as_str().strip_prefix(keys::OPERATIONS);
            let id = rest.and_then(|rest| rest.split_once('/')?.0.parse().ok());
            if let Some(id) = id {
                *found.entry(id).or_default() |= object.key == keys::decision(id);
            }
        }
        Ok(found)
    }

    /// The operation that `text` names: an id, or the beginning of exactly one.
    ///
    /// # Errors
    /// [`CatalogError::NotFound`] with similar ids; [`CatalogError::Ambiguous`] with all it may mean;
    /// [`CatalogError::Store`].
    pub async fn resolve_operation_id(&self, text: &str) -> Result<Uuid, CatalogError> {
        let wanted = text.to_ascii_lowercase();
        let ids: Vec<_> = self.operation_ids().await?.into_keys().collect();
        let of = |id: &&Uuid| !wanted.is_empty() && id.to_string().starts_with(&wanted);
        let found: Vec<_> = ids.iter().filter(of).collect();
        match found.as_slice() {
            [id] => Ok(**id),
            [] => Err(CatalogError::NotFound {
                what: "operation",
                id: text.to_owned(),
                nearest: nearest(&wanted, ids.iter().map(ToString::to_string)),
            }),
            several => Err(CatalogError::Ambiguous {
                what: "operation",
                text: text.to_owned(),
                candidates: several.iter().map(ToString::to_string).collect(),
            }),
        }
    }

    /// Reads an operation's journal.
    ///
    /// # Errors
    /// [`CatalogError::NotFound`] if it has no record; [`CatalogError::Damaged`]; [`CatalogError::Store`].
    pub async fn operation(&self, operation: Uuid) -> Result<JournalledOperation, CatalogError> {
        let records = journal::records(&**self.store(), operation).await?;
        if records.is_empty() {
            return Err(CatalogError::NotFound {
                what: "operation",
                id: operation.to_string(),
                nearest: Vec::new(),
            });
        }
        Ok(JournalledOperation { operation, records })
    }

    /// Operations of which something is decided and that have not ended: restores that have to be
    /// brought to their end before their nodes can be relied on.
    ///
    /// # Errors
    /// As [`Catalog::operation`].
    pub async fn decided_and_open(&self) -> Result<Vec<JournalledOperation>, CatalogError> {
        let ids = self.operation_ids().await?.into_iter();
        let decided = ids.filter_map(|(id, decided)| decided.then_some(id));
        let all = in_parallel(decided, |id| async move {
            match self.operation(id).await {
                Ok(operation) => Ok(Some(operation)),
                // Decided by somebody before its first record was there: nothing was ever begun.
                Err(error) if error.is_absent() => Ok(None),
                Err(error) => Err(error),
            }
        });
        let mut all: Vec<_> = all.await?.into_iter().flatten().collect();
        all.retain(|operation| operation.ended().is_none());
        Ok(all)
    }
}
