//! Data nodes and their epochs.

use std::fmt;

use jiff::{Timestamp, ToSpan as _};
use uuid::Uuid;

use super::{Catalog, in_parallel, nearest, stem};
use crate::check;
use crate::envelope::OBJECT_LIMIT;
use crate::error::CatalogError;
use crate::ids::EpochId;
use crate::keys;
use crate::model::{Epoch, LogAction, Node};
use crate::put::Outcome;

/// A data node to register.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewNode {
    /// PostgreSQL's system identifier.
    pub system_identifier: u64,
    /// Host name.
    pub host: String,
    /// Database port.
    pub port: u16,
}

/// An epoch to open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewEpoch {
    /// The node.
    pub node_id: Uuid,
    /// The epoch it continues and the WAL position (`X/X`) where it leaves it; `None` for a node's first.
    pub parent: Option<(EpochId, String)>,
    /// Timeline at the opening.
    pub timeline: u32,
    /// `/etc/machine-id` of the host.
    pub machine_id: String,
    /// Absolute path of the data directory.
    pub data_directory: String,
    /// Host name.
    pub host: String,
    /// Database port.
    pub port: u16,
}

/// What an agent says of the database it finds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeIdentity {
    /// PostgreSQL's system identifier.
    pub system_identifier: u64,
    /// `/etc/machine-id` of the host.
    pub machine_id: String,
    /// Absolute path of the data directory.
    pub data_directory: String,
}

/// A registered node with its newest epoch.
#[derive(Debug, Clone)]
pub struct KnownNode {
    /// The node.
    pub node: Node,
    /// Its newest epoch: where it lives.
    pub epoch: Epoch,
}

impl fmt::Display for KnownNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (epoch, id) = (&self.epoch, self.node.node_id);
        let (host, port, directory) = (&epoch.host, epoch.port, &epoch.data_directory);
        write!(
            f,
            "{id} ({directory} on {host}:{port}, epoch {})",
            epoch.epoch
        )
    }
}

/// Which registered node a database is.
#[derive(Debug, Clone)]
pub enum NodeMatch {
    /// This one, where its newest epoch says.
    Known(Box<KnownNode>),
    /// None: no node has its system identifier.
    New,
    /// The operator has to say: nodes with its system identifier live elsewhere (a move, a clone, a
    /// standby), or more than one lives there.
    Ambiguous(Vec<KnownNode>),
}

impl Catalog {
    /// Registers a data node under a new id. It has no epoch yet.
    ///
    /// # Errors
    /// [`CatalogError::Store`].
    pub async fn register_node(&self, new: NewNode, operation: Uuid) -> Result<Node, CatalogError> {
        self.register(Uuid::new_v4(), new, operation).await
    }

    /// Registers a data node under an id that was chosen before. Registered again, it is found as it is.
    ///
    /// # Errors
    /// [`CatalogError::Conflict`] if another database has this id; [`CatalogError::Damaged`];
    /// [`CatalogError::Store`].
    pub async fn register_node_as(
        &self,
        id: Uuid,
        new: NewNode,
        operation: Uuid,
    ) -> Result<Node, CatalogError> {
        let system_identifier = new.system_identifier;
        match self.node(id).await {
            Ok(node) if node.system_identifier == system_identifier => Ok(node),
            Ok(_) => Err(CatalogError::conflict(
                &keys::node(id),
                "another database has this id",
            )),
            Err(error) if error.is_absent() => self.register(id, new, operation).await,
            Err(error) => Err(error),
        }
    }

    async fn register(
        &self,
        node_id: Uuid,
        new: NewNode,
        operation: Uuid,
    ) -> Result<Node, CatalogError> {
        let node = Node {
            node_id,
            system_identifier: new.system_identifier,
            host: new.host,
            port: new.port,
            registered: Timestamp::now(),
            nonce: Uuid::new_v4(),
            extra: serde_json::Map::new(),
        };
        let key = keys::node(node.node_id);
        match self.create(&key, &node, OBJECT_LIMIT).await? {
            (sealed, Outcome::Ours) => {
                let action = LogAction::NodeRegistered;
                self.append_log(action, &key, &sealed.sha256, operation)
                    .await?;
                Ok(node)
            }
            (_, Outcome::Theirs(_)) => Err(CatalogError::conflict(&key, "another has this id")),
        }
    }

    /// Reads a node.
    ///
    /// # Errors
    /// [`CatalogError::NotFound`] with similar ids; [`CatalogError::Damaged`]; [`CatalogError::Store`].
    pub async fn node(&self, id: Uuid) -> Result<Node, CatalogError> {
        let key = keys::node(id);
        match self.read::<Node>(&key).await {
            Ok(node) if node.node_id == id => Ok(node),
            Ok(node) => {
                let what = format!("it says it is node {}", node.node_id);
                Err(CatalogError::damaged(&key, what))
            }
            Err(error) if error.is_absent() => Err(CatalogError::NotFound {
                what: "node",
                id: id.to_string(),
                nearest: nearest(&id.to_string(), self.names(keys::NODES).await?),
            }),
            Err(error) => Err(error),
        }
    }

    /// Every registered node. One that is damaged is an error: to overlook a node here would
    /// register it again.
    ///
    /// # Errors
    /// As [`Catalog::node`]; [`CatalogError::Damaged`] also for a key that is no node id.
    pub async fn nodes(&self) -> Result<Vec<Node>, CatalogError> {
        let listed = self.list(keys::NODES).await?;
        in_parallel(&listed, async |object| {
            let id = stem(&object.key, keys::NODES).and_then(|id| Uuid::parse_str(id).ok());
            let id = id.filter(|id| keys::node(*id) == object.key);
            let id =
                id.ok_or_else(|| CatalogError::damaged(&object.key, "its key is no node id"))?;
            self.node(id).await
        })
        .await
    }

    /// Opens a node's next epoch. It becomes the newest, whatever the clocks of those say who opened the
    /// ones before.
    ///
    /// # Errors
    /// [`CatalogError::NotFound`] if the node or the parent does not exist; [`CatalogError::Refused`] if
    /// the parent's position is none; [`CatalogError::Damaged`]; [`CatalogError::Store`].
    pub async fn start_epoch(&self, new: NewEpoch, operation: Uuid) -> Result<Epoch, CatalogError> {
        let node = self.node(new.node_id).await?.node_id;
        let epochs = self.epochs(node).await?;
        let id = EpochId::generate(new.timeline);
        let key = keys::epoch(node, &id);
        let (parent, fork_lsn) = new.parent.unzip();
        if let Some(parent) = &parent
            && !epochs.iter().any(|epoch| epoch.epoch == *parent)
        {
            let known = epochs.iter().map(|epoch| epoch.epoch.to_string());
            return Err(CatalogError::NotFound {
                what: "epoch",
                id: parent.to_string(),
                nearest: nearest(parent.as_str(), known),
            });
        }
        if let Some(fork) = &fork_lsn {
            check::lsn(fork).map_err(|why| CatalogError::refused(&key, why))?;
        }
        let newest = epochs.last().map(|epoch| epoch.opened);
        let after = newest.and_then(|newest| newest.checked_add(1.millisecond()).ok());
        let epoch = Epoch {
            node_id: node,
            epoch: id,
            parent,
            fork_lsn,
            timeline: new.timeline,
            machine_id: new.machine_id,
            data_directory: new.data_directory,
            host: new.host,
            port: new.port,
            opened: after.map_or_else(Timestamp::now, |after| after.max(Timestamp::now())),
            operation: Some(operation),
            nonce: Uuid::new_v4(),
            extra: serde_json::Map::new(),
        };
        match self.create(&key, &epoch, OBJECT_LIMIT).await? {
            (sealed, Outcome::Ours) => {
                let action = LogAction::EpochOpened;
                self.append_log(action, &key, &sealed.sha256, operation)
                    .await?;
                Ok(epoch)
            }
            (_, Outcome::Theirs(_)) => Err(CatalogError::conflict(&key, "another has this id")),
        }
    }

    /// Every epoch of a node, the oldest first.
    ///
    /// # Errors
    /// [`CatalogError::Damaged`] if one of them is; [`CatalogError::Store`].
    pub async fn epochs(&self, node: Uuid) -> Result<Vec<Epoch>, CatalogError> {
        // The names of all WAL files are in this listing. Epochs are few, so asking for each name's
        // first key only would need a delimiter, which the store's trait leaves out.
        let prefix = keys::epochs_prefix(node);
        let listed = self.list(&prefix).await?;
        let of_epoch = listed.iter().filter_map(|object| {
            let (name, file) = object.key.as_str().strip_prefix(&prefix)?.split_once('/')?;
            (file == "epoch.json").then_some((name, &object.key))
        });
        let mut epochs = in_parallel(of_epoch, async |(name, key)| {
            let epoch: Epoch = self.read(key).await?;
            if epoch.node_id == node && epoch.epoch.as_str() == name {
                Ok(epoch)
            } else {
                let (id, owner) = (&epoch.epoch, epoch.node_id);
                let what = format!("it says it is epoch {id} of node {owner}");
                Err(CatalogError::damaged(key, what))
            }
        })
        .await?;
        epochs.sort_by(|a, b| (a.opened, &a.epoch).cmp(&(b.opened, &b.epoch)));
        Ok(epochs)
    }

    /// A node's newest epoch, the one that is open; `None` if it has none yet.
    ///
    /// # Errors
    /// As [`Catalog::epochs`].
    pub async fn open_epoch(&self, node: Uuid) -> Result<Option<Epoch>, CatalogError> {
        Ok(self.epochs(node).await?.pop())
    }

    /// The epoch that an operation has opened for a node, if it has.
    ///
    /// # Errors
    /// As [`Catalog::epochs`].
    pub async fn epoch_of(
        &self,
        node: Uuid,
        operation: Uuid,
    ) -> Result<Option<Epoch>, CatalogError> {
        let mut epochs = self.epochs(node).await?.into_iter();
        Ok(epochs.rfind(|epoch| epoch.operation == Some(operation)))
    }

    /// An epoch, its parent, its parent's parent, and so on: where [`crate::wal::find_wal`] looks.
    ///
    /// # Errors
    /// [`CatalogError::NotFound`] if one of them is missing; as [`Catalog::epochs`].
    pub async fn epoch_chain(
        &self,
        node: Uuid,
        epoch: &EpochId,
    ) -> Result<Vec<Epoch>, CatalogError> {
        let mut epochs = self.epochs(node).await?;
        let mut chain = Vec::new();
        let mut next = Some(epoch.clone());
        while let Some(wanted) = next.take() {
            // What was taken is gone from `epochs`, so a circle of parents ends as a missing one.
            let Some(place) = epochs.iter().position(|epoch| epoch.epoch == wanted) else {
                return Err(CatalogError::NotFound {
                    what: "epoch",
                    id: wanted.to_string(),
                    nearest: Vec::new(),
                });
            };
            let epoch = epochs.swap_remove(place);
            next.clone_from(&epoch.parent);
            chain.push(epoch);
        }
        Ok(chain)
    }

    /// Finds the registered node that a database is: same system identifier, and machine and data
    /// directory are those of its newest epoch.
    ///
    /// # Errors
    /// As [`Catalog::nodes`] and [`Catalog::epochs`].
    pub async fn match_node(&self, identity: &NodeIdentity) -> Result<NodeMatch, CatalogError> {
        let nodes = self.nodes().await?;
        let nodes = nodes
            .into_iter()
            .filter(|node| node.system_identifier == identity.system_identifier);
        let found = in_parallel(nodes, async |node| {
            // A node without an epoch is what a crash left of a registration: nothing is of it.
            let epoch = self.open_epoch(node.node_id).await?;
            Ok(epoch.map(|epoch| KnownNode { node, epoch }))
        })
        .await?;
        let mut candidates: Vec<_> = found.into_iter().flatten().collect();
        let lives_here = |known: &KnownNode| {
            known.epoch.machine_id == identity.machine_id
                && known.epoch.data_directory == identity.data_directory
        };
        let mut here = (0..candidates.len()).filter(|place| lives_here(&candidates[*place]));
        Ok(match (here.next(), here.next()) {
            _ if candidates.is_empty() => NodeMatch::New,
            (Some(place), None) => NodeMatch::Known(Box::new(candidates.swap_remove(place))),
            _ => NodeMatch::Ambiguous(candidates),
        })
    }

    /// The names below a prefix.
    pub(crate) async fn names(&self, prefix: &str) -> Result<Vec<String>, CatalogError> {
        let listed = self.list(prefix).await?;
        let names = listed.iter().filter_map(|object| stem(&object.key, prefix));
        Ok(names.map(str::to_owned).collect())
    }
}
