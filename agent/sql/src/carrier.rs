//! The task that carries a session's bytes, and how its end is known.

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio_postgres::Connection;

use crate::error::chain;

/// A session's connection, in a task of its own that ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Carrier {
    /// Why the session is gone.
    ended: watch::Receiver<Option<String>>,
    end: watch::Sender<Option<String>>,
}

impl Carrier {
    /// Starts the task.
    pub(crate) fn spawn<S, T>(connection: Connection<S, T>) -> Self
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (end, ended) = watch::channel(None);
        let (task_end, mut task_ended) = (end.clone(), ended.clone());
        tokio::spawn(async move {
            let reason = tokio::select! {
                // Said by `close`: dropping the connection closes the socket.
                _ = task_ended.wait_for(Option::is_some) => return,
                result = connection => match result {
                    Ok(()) => "the connection was closed".to_owned(),
                    Err(error) => chain(&error),
                },
            };
            say_once(&task_end, reason);
        });
        Self { ended, end }
    }

    /// Why the session is gone, if that is known.
    pub(crate) fn ended(&self) -> Option<String> {
        self.ended.borrow().clone()
    }

    /// Waits for the end of the session.
    pub(crate) async fn wait_ended(&self) -> String {
        let mut ended = self.ended.clone();
        match ended.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or_default(),
            Err(_) => "the connection's task is gone".to_owned(),
        }
    }

    /// Ends the session.
    pub(crate) fn close(&self, reason: &str) {
        say_once(&self.end, reason.to_owned());
    }
}

/// The first reason counts.
fn say_once(end: &watch::Sender<Option<String>>, reason: String) {
    end.send_if_modified(|said| {
        let first = said.is_none();
        said.get_or_insert(reason);
        first
    });
}

/// Closes the session when a statement's answer was not waited for.
pub(crate) struct CloseUnlessAnswered<'a>(Option<&'a Carrier>);

impl<'a> CloseUnlessAnswered<'a> {
    /// Of the session's next answer.
    pub(crate) fn new(carrier: &'a Carrier) -> Self {
        Self(Some(carrier))
    }

    /// It came.
    pub(crate) fn answered(mut self) {
        self.0 = None;
    }
}

impl Drop for CloseUnlessAnswered<'_> {
    fn drop(&mut self) {
        if let Some(carrier) = self.0 {
            carrier.close("given up: a statement was not answered in time");
        }
    }
}
