//! The point of a backup, and the copies that are made again for it.
//!
//! Copies are hours of work, and a point is moments: one that fails is tried again, and the copies wait. If an agent was restarted, or
//! has ended its operation, the copy outlives that where the agent ships WAL all the time: another operation takes its place. Where the WAL was
//! held for this backup only, it is gone: then that copy alone is made again. The point is made anew in both cases, under another name.

use catalog::Catalog;
use catalog::journal::OperationJournal;
use futures_util::future::join_all;

use super::kind::Kind;
use super::nodes::Part;
use super::{Job, TRIES};
use crate::coordinator::Moment;
use crate::coordinator::shardingsphere::Budget;
use crate::failure::Result;
use crate::operations::{Operation, all_or_cancel, lost};

/// How often copies are made again in a backup; what is lost more often is no accident.
const AGAIN: u32 = 2;

impl Job<'_> {
    /// The point, made as the nodes are held together, with the copies of nodes that were lost meanwhile made again.
    pub(super) async fn pointed(
        &self,
        catalog: &Catalog,
        journal: &OperationJournal,
        parts: &[Part],
        kind: &Kind,
        copies: &mut [Operation],
    ) -> Result<Moment> {
        // One for all: what was locked for a point that came to nothing counts.
        let budget = Budget::new(self.args.point.lock_budget());
        let mut again = 0;
        loop {
            let failure = match self.moment(catalog, journal, &budget, copies).await {
                Ok(moment) => return Ok(moment),
                Err(failure) => failure,
            };
            if self.cancel.is_cancelled() || again == AGAIN {
                return Err(failure);
            }
            let places = self.lost(copies).await;
            if places.is_empty() {
                return Err(failure);
            }
            again += 1;
            let (kept, shipping) = (&*copies, &self.shipping());
            let made = all_or_cancel(&places, &self.cancel, |place, cancel| async move {
                let (part, copy) = (&parts[*place], &kept[*place]);
                // It is gone, and was counted as at work.
                self.live.cancel_on(&part.host.agent, self.printer).await;
                if let Some(copy) = copy.copy() {
                    let ready = shipping.ready(part.stand(), Some(copy), &cancel).await;
                    match ready {
                        Ok(ready) => return Ok((ready, true)),
                        Err(failure) if cancel.is_cancelled() => return Err(failure),
                        Err(failure) => {
                            let message = format!("its copy is made again: {failure}");
                            let name = part.host.agent.name();
                            self.printer.warning(Some(&name), &message);
                        }
                    }
                }
                let made = self.copied(part, kind, again * TRIES + 1, &cancel).await;
                made.map(|copied| (copied, false))
            });
            for (place, (made, is_kept)) in places.iter().zip(made.await?) {
                if is_kept {
                    copies[*place].becomes(made);
                } else {
                    copies[*place] = made;
                }
            }
        }
    }

    /// Which copies are no more, each told with the reason.
    async fn lost(&self, copies: &[Operation]) -> Vec<usize> {
        let asked = copies.iter().map(|copy| lost(copy.agent(), copy.id()));
        let asked = join_all(asked).await.into_iter().enumerate();
        let places = asked.filter_map(|(place, lost)| {
            let lost = lost?;
            let message = match copies[place].copy() {
                Some(_) => {
                    format!("its copy is kept, and it is made ready for the point again: {lost}")
                }
                None => format!("its copy is made again, and the others are kept: {lost}"),
            };
            let name = copies[place].agent().name();
            self.printer.warning(Some(&name), &message);
            Some(place)
        });
        places.collect()
    }
}
