//! What a client does next. All of it follows from its seed.

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::{ACCOUNTS, Kind};

/// Most clients at once.
pub(super) const CLIENTS: i64 = 64;
/// Accounts of each node that belong to one client: nobody else's lock is in its way.
const OWN: i64 = 4;
/// The others belong to all whose statements are sent in the order of accounts: no two wait for each other.
const SHARED: std::ops::Range<i64> = CLIENTS * OWN..ACCOUNTS;
/// Most legs of a transfer.
const LEGS: i64 = 8;
/// Transfers of one client of one bank.
const TRANSFERS: i64 = 1_000_000;

/// One side of a transfer: a row of the ledger, and what it adds to an account.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Leg {
    /// Key in the ledger: on the account's node.
    pub(super) id: i64,
    pub(super) account: i64,
    pub(super) amount: i64,
}

/// One transfer. Its legs are in the order of accounts, and sum up to nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) transfer: i64,
    pub(super) legs: Vec<Leg>,
}

/// Where plans come from. The n-th plan of a client follows from seed, bank, client and n alone, whatever became of those before.
#[derive(Debug)]
pub(super) struct Planner {
    random: StdRng,
    client: i64,
    kind: Kind,
    nodes: i64,
    next: i64,
}

impl Planner {
    pub(super) fn new(client: usize, kind: Kind, nodes: usize, seed: u64, shift: i64) -> Self {
        let client = i64::try_from(client).expect("few clients");
        let stream = (shift * CLIENTS + client).unsigned_abs();
        let seed = seed.wrapping_mul(0x9E37_79B9).wrapping_add(stream);
        Self {
            random: StdRng::seed_from_u64(seed),
            client,
            kind,
            nodes: i64::try_from(nodes).expect("few nodes"),
            next: (shift * CLIENTS + client) * TRANSFERS,
        }
    }

    /// Another number each time.
    pub(super) fn next(&mut self) -> Plan {
        let transfer = self.next;
        self.next += 1;
        let amount = self.random.random_range(1..=9);
        let shard = self.random.random_range(0..self.nodes);
        let mut legs = match self.kind {
            Kind::Autocommit => vec![(self.own(shard), 0)],
            Kind::OneNode => vec![(self.own(shard), -amount), (self.own(shard), amount)],
            Kind::TwoPhase => vec![
                (self.own(shard), -amount),
                (self.own_elsewhere(shard), amount),
            ],
            Kind::Batch => {
                let more = self.random.random_range(1..=9);
                let other = self.own_elsewhere(shard);
                vec![
                    (self.own(shard), -amount),
                    (other, amount),
                    (self.own(shard), more),
                    (self.own_elsewhere(shard), -more),
                ]
            }
            Kind::Simple | Kind::Prepared => {
                let local = self.nodes == 1 || self.random.random_bool(0.2);
                let to = if local { shard } else { self.elsewhere(shard) };
                vec![(self.own(shard), -amount), (self.shared(to), amount)]
            }
        };
        legs.sort_unstable();
        let numbered = legs
            .into_iter()
            .zip(0..)
            .map(|((account, amount), number)| Leg {
                id: (transfer * LEGS + number) * self.nodes + account % self.nodes,
                account,
                amount,
            });
        let legs = numbered.collect();
        Plan { transfer, legs }
    }

    fn own(&mut self, shard: i64) -> i64 {
        let number = self.client * OWN + self.random.random_range(0..OWN);
        number * self.nodes + shard
    }

    fn own_elsewhere(&mut self, shard: i64) -> i64 {
        let shard = self.elsewhere(shard);
        self.own(shard)
    }

    fn shared(&mut self, shard: i64) -> i64 {
        self.random.random_range(SHARED) * self.nodes + shard
    }

    /// Another shard, if there is one.
    fn elsewhere(&mut self, shard: i64) -> i64 {
        if self.nodes == 1 {
            return shard;
        }
        (shard + self.random.random_range(1..self.nodes)) % self.nodes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [Kind; 6] = [
        Kind::Simple,
        Kind::Prepared,
        Kind::Batch,
        Kind::Autocommit,
        Kind::OneNode,
        Kind::TwoPhase,
    ];

    #[test]
    fn plans_keep_the_sum_and_follow_from_their_seed() {
        for (client, kind) in KINDS.into_iter().enumerate() {
            let plans = |seed| {
                let mut planner = Planner::new(client, kind, 3, seed, 2);
                (0..500).map(|_| planner.next()).collect::<Vec<_>>()
            };
            let (first, again, other) = (plans(7), plans(7), plans(8));
            assert_eq!(first, again);
            assert_ne!(first, other);
            let mut next_bank = Planner::new(client, kind, 3, 7, 3);
            let amounts = |plan: &Plan| plan.legs.iter().map(|leg| leg.amount).collect::<Vec<_>>();
            let next: Vec<_> = (0..500).map(|_| amounts(&next_bank.next())).collect();
            let now: Vec<_> = first.iter().map(amounts).collect();
            assert_eq!(kind == Kind::Autocommit, next == now, "{kind:?}");
            for plan in &first {
                assert_eq!(plan.legs.iter().map(|leg| leg.amount).sum::<i64>(), 0);
                for leg in &plan.legs {
                    assert_eq!(
                        leg.id % 3,
                        leg.account % 3,
                        "row and account are on one node"
                    );
                    assert!((0..3 * ACCOUNTS).contains(&leg.account));
                }
            }
        }
    }

    #[test]
    fn rows_of_the_ledger_have_keys_of_their_own() {
        let mut seen = std::collections::HashSet::new();
        for shift in 0..2 {
            for (client, kind) in KINDS.into_iter().enumerate() {
                let mut planner = Planner::new(client, kind, 3, 1, shift);
                for _ in 0..200 {
                    assert!(planner.next().legs.iter().all(|leg| seen.insert(leg.id)));
                }
            }
        }
    }
}
