//! What may go: a plan made of what the bucket holds, and its execution.
//!
//! [`Holdings::read`] looks, [`plan::prune`] and [`plan::delete`] decide without asking anybody, and
//! [`apply::apply`] does it. Applying may stop anywhere: what it has done is a step on the way, and the plan of
//! the next run is the rest.
//!
//! # Why nothing is deleted that somebody needs
//!
//! **A listed backup never lacks an object.** A complete backup gets its tombstone before a byte of it goes, and
//! one that is not complete gets a fence (an `abandoned` manifest, created only if there is none) before
//! anything below its name goes. If the fence finds a complete manifest, the backup had just come to be: all is
//! looked at again. Tombstones and fences stay for ever. A writer that wakes up late finds its manifest
//! refused; what it still uploads lies below a fence, and is garbage of the next run.
//!
//! **WAL.** A segment goes if it lies in no stretch that somebody needs. Stretches, by node and epoch, on any
//! timeline: from a kept backup's first segment to its last and to that of each point it can serve. That is
//! all a recovery ever asks for (it may ask for more, and is told that there is none). What follows a kept backup's copies
//! without a hole stays too: where WAL is shipped all the time, the next point is made behind it. Beside them there are
//! backups under way, whose first segment is not known yet. They need nothing that was uploaded before they
//! began: an agent uploads whole segments that the server has flushed, and a copy starts at the server's end of
//! WAL. So everything stays that was uploaded since the oldest unfinished and unfenced operation journalled its
//! start (by the store's dates, less [`plan::MARGIN`]).
//!
//! The order in which the bucket is listed makes this hold while others write: WAL, then points, then
//! operations, then backups. An operation journals its start before it uploads, and its end after its manifest.
//! So a segment that was listed has its operation in the listing after it, and an operation that had
//! ended has its manifest there. Timeline histories, `epoch.json` and keys that this program does not know stay.
//!
//! **What cannot be read is not judged.** While there is a manifest or a point that is damaged or of a newer format,
//! or a manifest that the log knows and the bucket has lost, nobody knows what WAL it needs: no WAL and no point
//! goes.

pub mod apply;
mod garbage;
mod holdings;
mod log;
pub mod plan;
mod stretch;
mod view;

pub use holdings::{
    BackupHolding, GapHolding, HeldState, Holdings, OperationHolding, PointHolding, Stored,
    WalHolding,
};
