//! What is known of the proxies from one point to the next.
//!
//! Finding them costs a log-in to each. A point that is made every few seconds asks those that are known instead, in the sessions that are
//! there; if any answer is not what it was, they are found anew.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use tokio_util::sync::CancellationToken;

use super::{ProxyAccess, Reached};
use crate::failure::Result;

/// Proxies that were found, until somebody needs them.
#[derive(Debug, Default)]
pub(crate) struct Known(Mutex<Option<Reached>>);

impl Known {
    /// All proxies: those that were kept, if they are still all that there are and answer, else found anew.
    ///
    /// # Errors
    /// As [`Reached::find`].
    pub(crate) async fn reached(
        &self,
        access: &ProxyAccess,
        cancel: &CancellationToken,
    ) -> Result<Reached> {
        let begun = Instant::now();
        if let Some(kept) = self.replaced(None)
            && cancel.run_until_cancelled(kept.holds()).await == Some(true)
        {
            tracing::debug!(took = ?begun.elapsed(), "the proxies are those that are known");
            return Ok(kept);
        }
        let found = Reached::find(access, cancel).await?;
        tracing::debug!(took = ?begun.elapsed(), "the proxies were found anew");
        Ok(found)
    }

    /// Keeps them for the next time.
    pub(crate) fn keep(&self, reached: Reached) {
        self.replaced(Some(reached));
    }

    fn replaced(&self, reached: Option<Reached>) -> Option<Reached> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut kept, reached)
    }
}
