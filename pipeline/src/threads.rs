//! Named threads for CPU work, joined from async code.

use std::thread;

use tokio::sync::oneshot;

use crate::error::PipelineError;

/// A thread that was started. Dropping this does not end it: its channels do.
#[derive(Debug)]
pub(crate) struct Worker<T> {
    name: String,
    result: oneshot::Receiver<T>,
}

/// Starts a thread.
///
/// # Errors
/// [`PipelineError::Setup`] if the system has none left.
pub(crate) fn spawn<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<Worker<T>, PipelineError> {
    let (sender, result) = oneshot::channel();
    let run = move || {
        // Nobody waits if the job was dropped.
        let _ = sender.send(work());
    };
    let started = thread::Builder::new().name(name.to_owned()).spawn(run);
    started.map_err(|error| PipelineError::Setup(format!("thread `{name}`: {error}")))?;
    Ok(Worker {
        name: name.to_owned(),
        result,
    })
}

impl<T> Worker<T> {
    /// Waits for its result.
    ///
    /// # Errors
    /// [`PipelineError::Panicked`].
    pub(crate) async fn join(self) -> Result<T, PipelineError> {
        let Self { name, result } = self;
        // The sender is dropped unsent by a panic only.
        let panicked = |_| PipelineError::Panicked { thread: name };
        result.await.map_err(panicked)
    }
}
