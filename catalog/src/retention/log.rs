//! What the log says.

use crate::error::CatalogError;
use crate::model::LogEntry;
use crate::repo::{Catalog, in_parallel};

/// All entries. Those that cannot be read say nothing: that they are damaged is for `verify` to say.
pub(super) async fn entries(catalog: &Catalog) -> Result<Vec<LogEntry>, CatalogError> {
    let last = catalog.log_head().await?.map_or(0, |head| head.seq);
    let entries = in_parallel(1..=last, |seq| async move {
        match catalog.log_entry(seq).await {
            Ok(entry) => Ok(Some(entry)),
            Err(error) if error.is_of_object() => Ok(None),
            Err(error) => Err(error),
        }
    });
    Ok(entries.await?.into_iter().flatten().collect())
}
