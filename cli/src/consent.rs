//! The yes of whoever is there, before something is changed that cannot be taken back.

use tokio_util::sync::CancellationToken;

use crate::failure::{Failure, Result};
use crate::printer::Printer;
use crate::settings::Settings;

/// Asked before the first request: what nobody can agree to need not be planned.
///
/// # Errors
/// If there is no `--yes`, and nobody to ask.
pub(crate) fn possible(settings: &Settings) -> Result<()> {
    if settings.yes() || Printer::can_ask() {
        return Ok(());
    }
    let message = "`--yes` is missing, and there is no terminal to ask for a yes at";
    Err(Failure::usage(message).next("run it again with `--yes`"))
}

/// Has `question` answered; `nobody` is the failure if there is nobody to ask.
///
/// # Errors
/// If the answer is no, or there is none; a cancellation.
pub(crate) async fn agreed(
    question: &str,
    nobody: Failure,
    settings: &Settings,
    printer: &Printer,
    cancel: &CancellationToken,
) -> Result<()> {
    if settings.yes() {
        return Ok(());
    }
    let (printer, question) = (printer.clone(), question.to_owned());
    let asked = tokio::task::spawn_blocking(move || printer.confirm(&question));
    let answer = tokio::select! {
        answer = asked => answer.ok().flatten(),
        () = cancel.cancelled() => return Err(Failure::cancelled()),
    };
    match answer {
        Some(true) => Ok(()),
        Some(false) => Err(Failure::cancelled().next("answer `yes`, or use `--yes`")),
        None => Err(nobody),
    }
}
