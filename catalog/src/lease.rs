//! Leases: who operates now, one operator a scope.
//!
//! Objects are written once, so a lease is a row of them: taking it, each renewal and giving it back create
//! the next number, and the highest one says how things stand. It lives `ttl_ms` from the date that the STORE
//! gave it, by the store's clock: no clock of an operator counts.
//!
//! A lease alone keeps nobody from writing: an operator may stand still for any time between two calls. What
//! does is the fence ([`crate::fence`]) that a taker writes for its predecessor BEFORE it takes the lease. In
//! this order, because a taker may die in between: the next one then finds the same predecessor again.

use std::time::{Duration, Instant, SystemTime};

use jiff::Timestamp;
use pipeline::store::{Detail, Key, ObjectMeta, StoreError};
use uuid::Uuid;

use crate::envelope::{self, OBJECT_LIMIT};
use crate::error::CatalogError;
use crate::fence::Fenced;
use crate::ids::BackupId;
use crate::keys;
use crate::model::{Holder, Lease, LeaseScope, LeaseState};
use crate::put::Outcome;
use crate::repo::Catalog;

/// Stores give dates in whole seconds, cut off: a lease never ends early for it.
const GRAIN: Duration = Duration::from_secs(1);
/// The longest time to live that is believed or written.
const LONGEST: Duration = Duration::from_hours(24);
/// How often a lease that changes while it is looked at is looked at again.
const LOOKS: u32 = 100;

/// How a scope stands: its newest lease, and what the store's clock says to it.
#[derive(Debug, Clone)]
pub struct StandingLease {
    /// The newest lease object.
    pub lease: Lease,
    /// When it ends, or ended, by the store's clock.
    pub until: Timestamp,
    /// Whether it has run out.
    pub expired: bool,
}

impl StandingLease {
    /// Whether somebody operates.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.lease.state == LeaseState::Held && !self.expired
    }
}

/// What an operation asks a lease for.
#[derive(Debug, Clone)]
pub struct LeaseRequest {
    /// What it is about.
    pub scope: LeaseScope,
    /// The operation.
    pub operation: Uuid,
    /// The backup that it makes (scope `backup`).
    pub backup_id: Option<BackupId>,
    /// Who asks.
    pub holder: Holder,
    /// How long it lives without a renewal; whole milliseconds, at most a day.
    pub ttl: Duration,
}

/// A lease that was taken.
#[derive(Debug)]
pub struct Taken {
    /// The lease.
    pub lease: HeldLease,
    /// Whose lease had run out, and what became of what it had not finished.
    pub predecessor: Option<(Lease, Fenced)>,
}

impl Catalog {
    /// The newest lease of a scope; `None` if there never was one.
    ///
    /// # Errors
    /// [`CatalogError::Damaged`] and [`CatalogError::NewerFormat`] if it cannot be read: then nobody can say
    /// who operates; [`CatalogError::Store`].
    pub async fn lease(&self, scope: LeaseScope) -> Result<Option<StandingLease>, CatalogError> {
        for _ in 0..LOOKS {
            let Some((seq, object)) = self.newest_lease(scope).await? else {
                return Ok(None);
            };
            let key = keys::lease(scope, seq);
            let lease: Lease = match self.read(&key).await {
                Ok(lease) => lease,
                // Removed as an old one: there is a newer one.
                Err(error) if error.is_absent() => continue,
                Err(error) => return Err(error),
            };
            if lease.scope != scope || lease.seq != seq {
                let what = format!("it says it is {} {}", lease.scope.name(), lease.seq);
                return Err(CatalogError::damaged(&key, what));
            }
            let written = match object.last_modified {
                Some(written) => written,
                None => self.date_of(&key).await?,
            };
            let ttl = Duration::from_millis(lease.ttl_ms).min(LONGEST);
            let until = written + ttl + GRAIN;
            // Asked after the listing: what the answer proves to be over is over.
            let expired = self.store().now().await? >= until;
            let until = timestamp(&key, until)?;
            return Ok(Some(StandingLease {
                lease,
                until,
                expired,
            }));
        }
        Err(busy(scope))
    }

    /// Takes a lease that nobody holds. One that has run out is taken over: what its holder had not finished
    /// is fenced first.
    ///
    /// # Errors
    /// [`CatalogError::Leased`] with its holder and its end; [`CatalogError::Damaged`] if the newest lease or
    /// what has to be fenced cannot be read; [`CatalogError::Store`]: if its outcome is unknown, the lease may
    /// stand and runs out by itself.
    pub async fn take_lease(&self, request: LeaseRequest) -> Result<Taken, CatalogError> {
        let scope = request.scope;
        for _ in 0..LOOKS {
            let standing = self.lease(scope).await?;
            let (seq, predecessor) = match standing {
                None => (1, None),
                Some(standing) if standing.is_held() => {
                    return Err(CatalogError::Leased {
                        scope,
                        held: Box::new(standing.lease),
                        until: standing.until,
                    });
                }
                Some(StandingLease { lease, .. }) if lease.state == LeaseState::Released => {
                    (lease.seq + 1, None)
                }
                Some(StandingLease { lease, .. }) => {
                    let fenced = self.fence(&lease).await?;
                    (lease.seq + 1, Some((lease, fenced)))
                }
            };
            let (begun, at) = (Instant::now(), Timestamp::now());
            let lease = Lease {
                scope,
                seq,
                operation: request.operation,
                backup_id: request.backup_id.clone(),
                holder: request.holder.clone(),
                state: LeaseState::Held,
                ttl_ms: milliseconds(request.ttl),
                taken: at,
                at,
                log_head: self.log_head().await?.map(|head| (head.seq, head.sha256)),
                nonce: Uuid::new_v4(),
                extra: serde_json::Map::new(),
            };
            let key = keys::lease(scope, seq);
            let (_, outcome) = self.create(&key, &lease, OBJECT_LIMIT).await?;
            // A number that is free because old leases were removed gives nothing to a taker that was slow.
            if let Outcome::Ours = outcome
                && self.newest_lease(scope).await?.map(|(seq, _)| seq) == Some(seq)
            {
                let lease = HeldLease {
                    catalog: self.clone(),
                    lease,
                    confirmed: begun,
                    pending: None,
                };
                return Ok(Taken { lease, predecessor });
            }
        }
        Err(busy(scope))
    }

    /// Lease objects of a scope that say nothing any more: all but the newest. They may be deleted at any time.
    ///
    /// # Errors
    /// [`CatalogError::Store`].
    pub async fn old_leases(&self, scope: LeaseScope) -> Result<Vec<Key>, CatalogError> {
        let listed = self.list(&keys::leases_prefix(scope)).await?;
        let mut keys: Vec<_> = listed
            .into_iter()
            .filter(|object| seq(scope, &object.key).is_some())
            .map(|object| object.key)
            .collect();
        keys.sort();
        keys.pop();
        Ok(keys)
    }

    async fn newest_lease(
        &self,
        scope: LeaseScope,
    ) -> Result<Option<(u64, ObjectMeta)>, CatalogError> {
        let listed = self.list(&keys::leases_prefix(scope)).await?;
        let numbered = listed
            .into_iter()
            .filter_map(|object| Some((seq(scope, &object.key)?, object)));
        Ok(numbered.max_by_key(|(seq, _)| *seq))
    }

    async fn date_of(&self, key: &Key) -> Result<SystemTime, CatalogError> {
        let meta = self.store().head(key).await?;
        meta.last_modified.ok_or_else(|| {
            let words = "the store does not say when it was written";
            StoreError::Invalid(Detail::new("head", key.as_str(), words)).into()
        })
    }
}

/// A lease that is ours. Dropped without [`HeldLease::release`] it runs out by itself.
#[derive(Debug)]
pub struct HeldLease {
    catalog: Catalog,
    lease: Lease,
    /// When the write began that is known to stand: the lease lives at least its time to live from here.
    confirmed: Instant,
    /// A write whose outcome is not known yet, and when it began.
    pending: Option<(Lease, Instant)>,
}

impl HeldLease {
    /// The lease as it was last written.
    #[must_use]
    pub fn lease(&self) -> &Lease {
        &self.lease
    }

    /// How long it lives without a renewal.
    #[must_use]
    pub fn ttl(&self) -> Duration {
        Duration::from_millis(self.lease.ttl_ms)
    }

    /// How long ago the last write began that is known to stand.
    #[must_use]
    pub fn age(&self) -> Duration {
        self.confirmed.elapsed()
    }

    /// Renews it at the store, and so proves that it was ours until now. One that ran out and that nobody
    /// took over or fenced is renewed as well. May be dropped: the next call finds out what became of it.
    ///
    /// # Errors
    /// [`CatalogError::LeaseLost`]: nothing may be written any more; [`CatalogError::Store`]: it may be tried
    /// again, and until that succeeds nothing may be committed.
    pub async fn renew(&mut self) -> Result<(), CatalogError> {
        // Ran out, perhaps, by the store's clock: whoever saw that may have fenced our operation
        // without taking the lease (yet).
        let late = self.age() >= self.ttl();
        self.write_next(LeaseState::Held).await?;
        if late && self.catalog.is_fenced(&self.lease).await? {
            return Err(self.lost(None));
        }
        Ok(())
    }

    /// Gives it back. Only for an operation that leaves nothing open: whose commit stands, is refused for
    /// ever, or was never tried. Others let it run out, so that the next one fences them.
    ///
    /// # Errors
    /// [`CatalogError::LeaseLost`]; [`CatalogError::Store`]: it runs out by itself.
    pub async fn release(mut self) -> Result<(), CatalogError> {
        self.write_next(LeaseState::Released).await
    }

    async fn write_next(&mut self, state: LeaseState) -> Result<(), CatalogError> {
        // What became of a write whose reply was lost has to be known first: its number is ours or theirs.
        if let Some((lease, begun)) = self.pending.clone() {
            self.settle(lease, begun).await?;
        }
        let begun = Instant::now();
        let head = self.catalog.log_head().await?;
        let lease = Lease {
            seq: self.lease.seq + 1,
            state,
            at: Timestamp::now(),
            log_head: head.map(|head| (head.seq, head.sha256)),
            nonce: Uuid::new_v4(),
            ..self.lease.clone()
        };
        self.pending = Some((lease.clone(), begun));
        self.settle(lease, begun).await
    }

    async fn settle(&mut self, lease: Lease, begun: Instant) -> Result<(), CatalogError> {
        let key = keys::lease(lease.scope, lease.seq);
        let (_, outcome) = self.catalog.create(&key, &lease, OBJECT_LIMIT).await?;
        if let Outcome::Theirs(stored) = outcome {
            return Err(self.lost(envelope::open(&key, &stored).ok()));
        }
        let newest = self.catalog.newest_lease(lease.scope).await?;
        match newest {
            Some((seq, _)) if seq == lease.seq => {}
            _ => {
                let standing = self.catalog.lease(lease.scope).await.ok().flatten();
                return Err(self.lost(standing.map(|standing| standing.lease)));
            }
        }
        self.pending = None;
        self.lease = lease;
        self.confirmed = begun;
        Ok(())
    }

    fn lost(&self, taker: Option<Lease>) -> CatalogError {
        CatalogError::LeaseLost {
            scope: self.lease.scope,
            taker: taker.map(Box::new),
        }
    }
}

/// The number in a lease's key; `None` if it is no key of ours.
fn seq(scope: LeaseScope, key: &Key) -> Option<u64> {
    let digits = key
        .as_str()
        .strip_prefix(&keys::leases_prefix(scope))?
        .strip_suffix(".json")?;
    let valid = digits.len() == 10 && digits.bytes().all(|byte| byte.is_ascii_digit());
    valid.then(|| digits.parse().ok()).flatten()
}

fn milliseconds(ttl: Duration) -> u64 {
    u64::try_from(ttl.min(LONGEST).as_millis()).unwrap_or(u64::MAX)
}

fn timestamp(key: &Key, at: SystemTime) -> Result<Timestamp, CatalogError> {
    Timestamp::try_from(at).map_err(|error| {
        let words = format!("the store's date of it cannot be: {error}");
        StoreError::Invalid(Detail::new("list", key.as_str(), words)).into()
    })
}

fn busy(scope: LeaseScope) -> CatalogError {
    let what = format!("it was taken by others {LOOKS} times while we looked");
    CatalogError::Conflict {
        key: keys::leases_prefix(scope),
        what,
    }
}
