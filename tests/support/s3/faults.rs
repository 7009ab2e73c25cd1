//! Faults that a test asks the stand-in for, by operation and call.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// What a client asks of the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// `PutObject`
    Put,
    /// `GetObject`
    Get,
    /// `HeadObject`
    Head,
    /// `ListObjectsV2`
    List,
    /// `DeleteObjects`
    Delete,
    /// `CreateMultipartUpload`
    CreateUpload,
    /// `UploadPart`
    UploadPart,
    /// `CompleteMultipartUpload`
    Complete,
    /// `AbortMultipartUpload`
    Abort,
    /// `ListMultipartUploads`
    ListUploads,
    /// `ListParts`
    ListParts,
}

/// What goes wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// Nothing is done; the answer is this HTTP status and S3 error code.
    Refuse(u16, &'static str),
    /// Nothing is done, and the connection is cut.
    CutBefore,
    /// The request takes effect, then the connection is cut: a lost reply.
    CutAfter,
    /// The request takes effect, then the answer is `500 InternalError`.
    FailAfter,
    /// Nothing is done for this long; then all goes well.
    Stall(Duration),
    /// `Get` only: the announced body is cut after this many bytes.
    Truncate(u64),
    /// `Get` only: after this many bytes of the body nothing more is sent, for ever.
    Hang(u64),
}

impl Fault {
    /// `503 SlowDown`.
    pub const SLOW_DOWN: Self = Self::Refuse(503, "SlowDown");
}

#[derive(Debug)]
struct Rule {
    operation: Operation,
    skip: u64,
    times: u64,
    fault: Fault,
}

/// The faults asked for, and how often each operation was called.
#[derive(Debug, Default)]
pub(super) struct Faults {
    rules: Mutex<(Vec<Rule>, Vec<Operation>)>,
}

impl Faults {
    pub(super) fn add(&self, operation: Operation, skip: u64, times: u64, fault: Fault) {
        let mut rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        rules.0.push(Rule {
            operation,
            skip,
            times,
            fault,
        });
    }

    pub(super) fn calls(&self, operation: Operation) -> usize {
        let rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        rules.1.iter().filter(|&&made| made == operation).count()
    }

    pub(super) fn clear(&self) {
        let mut rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        rules.0.clear();
    }

    /// Counts a call and says what befalls it.
    pub(super) fn befall(&self, operation: Operation) -> Option<Fault> {
        let mut rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        rules.1.push(operation);
        let rules = &mut rules.0;
        let place = rules.iter().position(|rule| rule.operation == operation)?;
        let rule = &mut rules[place];
        if rule.skip > 0 {
            rule.skip -= 1;
            return None;
        }
        let fault = rule.fault.clone();
        rule.times = rule.times.saturating_sub(1);
        if rule.times == 0 {
            rules.remove(place);
        }
        Some(fault)
    }
}
