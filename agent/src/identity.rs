//! Is the database beside us the node in whose name its objects are to be written?
//!
//! The client has asked the same before it gave the order. It is asked again here, because here is where the bytes come
//! from: a copy of a database beside the original, or an order that was given for an epoch which has ended since, would
//! mix two histories under one name, and no restore could tell them apart.

use std::sync::Arc;
use std::time::Duration;

use agent_api::{ApiError, BackupSpec, ErrorKind};
use agent_sql::ServerFacts;
use catalog::model::Epoch;
use catalog::{Catalog, CatalogError};

use crate::engine::errors;
use crate::facts::machine_id;
use crate::operation::OperationContext;

/// To read the node's epochs.
const READ: Duration = Duration::from_mins(2);

/// Checks that the node's open epoch is the one of the order, and that it was opened for this database: same system
/// identifier, machine and data directory. Writes nothing.
///
/// # Errors
/// [`ErrorKind::Conflict`] if it is not, with what to say; what the catalog says if that cannot be seen.
pub async fn check(
    cx: &OperationContext,
    spec: &BackupSpec,
    facts: &ServerFacts,
) -> Result<(), ApiError> {
    let registered = async {
        let catalog = Catalog::open(Arc::clone(&cx.store)).await?;
        let node = catalog.node(spec.node_id).await?;
        let open = catalog.open_epoch(spec.node_id).await?;
        Ok::<_, CatalogError>((node, open))
    };
    let (node, open) = tokio::select! {
        biased;
        () = cx.cancel.cancelled() => return Err(ApiError::new(ErrorKind::Cancelled, "cancelled")),
        registered = tokio::time::timeout(READ, registered) => {
            registered.map_err(|_| late())?.map_err(errors::catalog)?
        }
    };
    if node.system_identifier != facts.system_identifier {
        return Err(another(
            spec,
            &format!(
                "node {} has system identifier {}, and the database here {}",
                node.node_id, node.system_identifier, facts.system_identifier
            ),
        ));
    }
    let Some(open) = open else {
        return Err(another(
            spec,
            &format!("node {} has no epoch", node.node_id),
        ));
    };
    same_place(&open, spec, &machine_id(), &facts.data_directory)
}

fn late() -> ApiError {
    let message = format!(
        "the node's epochs could not be read within {} s; nothing was written",
        READ.as_secs()
    );
    ApiError::new(ErrorKind::Timeout, message)
}

fn same_place(
    open: &Epoch,
    spec: &BackupSpec,
    machine: &str,
    directory: &str,
) -> Result<(), ApiError> {
    let lives = format!("`{}` on {}:{}", open.data_directory, open.host, open.port);
    if open.epoch != spec.epoch {
        return Err(another(
            spec,
            &format!(
                "the open epoch of node {} is {}, opened {} for {lives}; the order is for epoch {}",
                open.node_id, open.epoch, open.opened, spec.epoch
            ),
        ));
    }
    if open.machine_id != machine || open.data_directory != directory {
        return Err(another(
            spec,
            &format!(
                "epoch {} of node {} is of the database in {lives} (machine {}), and the one here is in `{directory}` \
                 (machine {machine})",
                open.epoch, open.node_id, open.machine_id
            ),
        ));
    }
    Ok(())
}

fn another(spec: &BackupSpec, why: &str) -> ApiError {
    let message = format!(
        "the database here is not the one that is to be backed up: {why}; nothing was written"
    );
    ApiError::new(ErrorKind::Conflict, message).next(format!(
        "run the backup again; if it asks, say `--node-id HOST:PORT={}` if this is that node, moved, or `--new-node \
         HOST:PORT` if it is another one",
        spec.node_id
    ))
}
