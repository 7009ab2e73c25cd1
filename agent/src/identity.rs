//! Is the database beside us the node in whose name its objects are to be written?
//!
//! The client has asked the same before it gave the order. It is asked again here, because here is where the bytes come
//! from: a copy of a database beside the original, or an order that was given for an epoch which has ended since, would
//! mix two histories under one name, and no restore could tell them apart.

use std::sync::Arc;
use std::time::Duration;

use agent_api::{ApiError, ErrorKind};
use agent_sql::ServerFacts;
use catalog::ids::EpochId;
use catalog::model::Epoch;
use catalog::{Catalog, CatalogError};
use uuid::Uuid;

use crate::engine::errors;
use crate::facts::machine_id;
use crate::operation::OperationContext;

/// To read the node's epochs.
const READ: Duration = Duration::from_mins(2);

/// What is to be written, and where the database is that it comes from.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// The node in whose name.
    pub node: Uuid,
    /// The epoch.
    pub epoch: &'a EpochId,
    /// The database's system identifier.
    pub system_identifier: u64,
    /// Its data directory, as it says.
    pub data_directory: &'a str,
}

/// Checks that the node's open epoch is the one of the order, and that it was opened for this database: same system
/// identifier, machine and data directory. Writes nothing.
///
/// # Errors
/// [`ErrorKind::Conflict`] if it is not, with what to say; what the catalog says if that cannot be seen.
pub async fn check(
    cx: &OperationContext,
    (node, epoch): (Uuid, &EpochId),
    facts: &ServerFacts,
) -> Result<(), ApiError> {
    let place = Place {
        node,
        epoch,
        system_identifier: facts.system_identifier,
        data_directory: &facts.data_directory,
    };
    let checked = async {
        let catalog = Catalog::open(Arc::clone(&cx.store)).await;
        check_in(&catalog.map_err(errors::catalog)?, &place).await
    };
    tokio::select! {
        biased;
        () = cx.cancel.cancelled() => Err(ApiError::new(ErrorKind::Cancelled, "cancelled")),
        checked = checked => checked,
    }
}

/// [`check`] in a repository that is open. Takes two minutes at most.
///
/// # Errors
/// As there.
pub async fn check_in(catalog: &Catalog, place: &Place<'_>) -> Result<(), ApiError> {
    let registered = async {
        let node = catalog.node(place.node).await?;
        let open = catalog.open_epoch(place.node).await?;
        Ok::<_, CatalogError>((node, open))
    };
    let registered = tokio::time::timeout(READ, registered).await;
    let (node, open) = registered.map_err(|_| late())?.map_err(errors::catalog)?;
    if node.system_identifier != place.system_identifier {
        return Err(another(
            place,
            &format!(
                "node {} has system identifier {}, and the database here {}",
                node.node_id, node.system_identifier, place.system_identifier
            ),
        ));
    }
    let Some(open) = open else {
        return Err(another(
            place,
            &format!("node {} has no epoch", node.node_id),
        ));
    };
    same_place(&open, place, &machine_id())
}

fn late() -> ApiError {
    let message = format!(
        "the node's epochs could not be read within {} s; nothing was written",
        READ.as_secs()
    );
    ApiError::new(ErrorKind::Timeout, message)
}

fn same_place(open: &Epoch, place: &Place<'_>, machine: &str) -> Result<(), ApiError> {
    let directory = place.data_directory;
    let lives = format!("`{}` on {}:{}", open.data_directory, open.host, open.port);
    if open.epoch != *place.epoch {
        return Err(another(
            place,
            &format!(
                "the open epoch of node {} is {}, opened {} for {lives}; the order is for epoch {}",
                open.node_id, open.epoch, open.opened, place.epoch
            ),
        ));
    }
    if open.machine_id != machine || open.data_directory != directory {
        return Err(another(
            place,
            &format!(
                "epoch {} of node {} is of the database in {lives} (machine {}), and the one here is in `{directory}` \
                 (machine {machine})",
                open.epoch, open.node_id, open.machine_id
            ),
        ));
    }
    Ok(())
}

fn another(place: &Place<'_>, why: &str) -> ApiError {
    let message = format!(
        "the database here is not the one that the order is for: {why}; nothing was written"
    );
    ApiError::new(ErrorKind::Conflict, message).next(format!(
        "run `gs_pitr backup`; if it asks, say `--node-id HOST:PORT={}` if this is that node, moved, or `--new-node \
         HOST:PORT` if it is another one",
        place.node
    ))
}
