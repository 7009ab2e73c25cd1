//! The journal of a command's operation in the bucket: begun before its work, ended after it.

use std::sync::Arc;

use catalog::Catalog;
use catalog::ids::BackupId;
use catalog::journal::{OperationJournal, OperationStart};
use catalog::model::Holder;
use serde_json::json;
use uuid::Uuid;

use crate::failure::Result;
use crate::printer::Printer;

/// An operation to journal.
#[derive(Debug)]
pub(crate) struct Journalled<'a> {
    /// Its id.
    pub(crate) operation: Uuid,
    /// `backup`, `restore`, ...
    pub(crate) kind: &'a str,
    /// The backup concerned.
    pub(crate) backup: Option<&'a BackupId>,
    /// Who runs it.
    pub(crate) by: Holder,
}

impl Journalled<'_> {
    /// Writes that the operation begins, does `work`, and writes how it ended. The journal of a failure that is
    /// [unfinished](crate::failure::Failure::unfinished) stays open: somebody will go on with it.
    ///
    /// # Errors
    /// What `work` ends with, or that the beginning could not be written: then it is not begun.
    pub(crate) async fn run<T>(
        self,
        catalog: &Catalog,
        printer: &Printer,
        text: Option<&str>,
        work: impl AsyncFnOnce(&OperationJournal) -> Result<T>,
    ) -> Result<T> {
        let start = OperationStart {
            operation: self.operation,
            kind: self.kind.to_owned(),
            backup_id: self.backup.cloned(),
            node_id: None,
            log_head: catalog.log_head().await?,
        };
        let store = Arc::clone(catalog.store());
        let journal = OperationJournal::start_by(store, start, Some(self.by)).await?;
        let fields = json!({"operation": self.operation, "backup_id": self.backup});
        printer.event("started", fields, text);
        let outcome = work(&journal).await;
        let failure = outcome.as_ref().err();
        if !failure.is_some_and(|failure| failure.unfinished) {
            let words = failure.map(ToString::to_string);
            ended(&journal, words.as_deref(), printer).await;
        }
        outcome
    }
}

/// Who we are, running `command`.
pub(crate) fn ourselves(command: &str) -> Holder {
    let uname = rustix::system::uname();
    let user = std::env::var("USER").or_else(|_| std::env::var("LOGNAME"));
    Holder {
        host: uname.nodename().to_string_lossy().into_owned(),
        user: user.unwrap_or_else(|_| format!("uid {}", rustix::process::getuid().as_raw())),
        pid: std::process::id(),
        command: command.to_owned(),
    }
}

/// Writes that an operation has ended. If that fails it counts as killed, which others can live with.
pub(crate) async fn ended(journal: &OperationJournal, error: Option<&str>, printer: &Printer) {
    if let Err(error) = journal.ended(error).await {
        let message = format!("the operation's end could not be journalled: {error}");
        printer.warning(None, &message);
    }
}
