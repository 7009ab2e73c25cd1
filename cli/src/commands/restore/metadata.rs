//! The end of a restore at the proxies: what they know is held against what was kept with the point, and brought back if that was asked
//! for. It is the same for `restore` and for `operations resume`: the plan says what is to be done.

use std::collections::BTreeMap;

use agent_api::Secret;
use catalog::Catalog;
use catalog::journal::OperationJournal;
use catalog::model::{MetadataAfter, RestorePlan};
use tokio_util::sync::CancellationToken;

use crate::cluster::ProxyAccess;
use crate::failure::Result;
use crate::importing::{Importing, command};
use crate::printer::Printer;

/// For the plan.
pub(crate) const IMPORTED: &str = "then databases whose metadata at the proxies differ from the point's are dropped there and imported (--import-metadata)";

/// Does what `plan` says of the proxies' metadata; all nodes are open. `secrets` are those that are not stored, by the names of their
/// placeholders.
///
/// # Errors
/// Of the import. The databases are restored, whatever becomes of it.
pub(crate) async fn metadata(
    plan: &RestorePlan,
    access: Option<&ProxyAccess>,
    secrets: &BTreeMap<String, Secret>,
    (catalog, journal): (&Catalog, &OperationJournal),
    printer: &Printer,
) -> Result<()> {
    let import = match plan.metadata {
        MetadataAfter::Leave => return Ok(()),
        MetadataAfter::Compare => false,
        MetadataAfter::Import => true,
    };
    let Some(access) = access else {
        if import {
            let message = format!(
                "the restore was to bring back what the proxies knew at the point, and no proxy is given: `{}`",
                command(&plan.point_id, true)
            );
            printer.warning(None, &message);
        }
        return Ok(());
    };
    let importing = Importing {
        catalog,
        access,
        printer,
        cancel: &CancellationToken::new(),
    };
    let told = import.then_some(secrets);
    importing.after_restore(&plan.point_id, told, journal).await
}
