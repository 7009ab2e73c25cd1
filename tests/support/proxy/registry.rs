//! What the proxies share: it plays ZooKeeper.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, watch};

use super::delay::Step;
use super::instance::Instance;
use super::{Clock, ClusterState, DataNode, ProxyFarmOptions, Transaction};

/// A logical database.
#[derive(Debug, Clone)]
pub(super) struct Database {
    /// Storage units by name; the router numbers them in this order.
    pub units: BTreeMap<String, DataNode>,
    pub rules: BTreeMap<String, TableRule>,
    /// Whether proxies that start find its tables' metadata. IMPORT does not write it.
    pub has_tables: bool,
    /// From when on it can be used.
    pub usable: Instant,
}

impl Database {
    pub(super) fn new(usable: Instant) -> Self {
        Self {
            units: BTreeMap::new(),
            rules: BTreeMap::new(),
            has_tables: true,
            usable,
        }
    }

    /// The sharding column of `table`.
    pub(super) fn column(&self, table: &str) -> &str {
        self.rules.get(table).map_or("id", |rule| &rule.column)
    }
}

/// How a table is sharded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TableRule {
    pub column: String,
    /// As it was given.
    pub sharding_count: String,
}

/// A proxy in the list of compute nodes.
#[derive(Debug, Clone)]
pub(super) struct Member {
    pub id: String,
    pub port: u16,
    pub worker: usize,
    /// When its session ends, if nothing is heard of it any more.
    until: Option<Instant>,
}

/// Everything that stands in the registry.
pub(super) struct Shared {
    state: ClusterState,
    /// Locks that were written so far.
    pub locks: usize,
    members: Vec<Member>,
    pub databases: BTreeMap<String, Database>,
    pub users: BTreeMap<String, String>,
    pub transaction: Transaction,
    pub clock: Clock,
    /// Properties of the whole cluster, as EXPORT writes them.
    pub props: String,
    /// IMPORTs of a database that was dropped which still fail.
    pub failing_imports: BTreeMap<String, usize>,
    drops: usize,
    instances: Vec<Weak<Instance>>,
}

/// Faults on demand that belong to no single proxy.
#[derive(Debug, Default)]
pub(super) struct Faults {
    pub lose_lock_replies: AtomicUsize,
    pub ignore_unlocks: AtomicUsize,
    pub delay_lock: Mutex<Option<Duration>>,
}

/// Takes one of a counted fault, if there is one.
pub(super) fn take(count: &AtomicUsize) -> bool {
    let less = |count: usize| count.checked_sub(1);
    count
        .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less)
        .is_ok()
}

/// The shared state.
pub(super) struct Registry {
    shared: Mutex<Shared>,
    /// The internal mutex of LOCK and UNLOCK.
    mutex: Semaphore,
    /// How many in the tests hold it.
    holders: watch::Sender<usize>,
    pub faults: Faults,
    /// `csn` in Redis.
    pub csn: AtomicI64,
    pub host: String,
    listed_after_kill: Duration,
    listed_after_cut: Duration,
}

/// What Redis starts with.
const FIRST_CSN: i64 = 2_147_483_647;

/// Properties that proxies begin with.
const FIRST_PROPS: &str =
    "props:\n  proxy-frontend-database-protocol-type: PostgreSQL\n  system-log-level: INFO\n";

/// How often IMPORT was tried after a DROP until it took.
const TRIES: [usize; 8] = [2, 1, 3, 1, 5, 3, 1, 1];

impl Registry {
    pub(super) fn new(options: &ProxyFarmOptions) -> Arc<Self> {
        let mut database = Database::new(Instant::now());
        for (number, node) in options.nodes.iter().enumerate() {
            database.units.insert(format!("ds_{number}"), node.clone());
        }
        for (table, column) in &options.sharded {
            let rule = TableRule {
                column: column.clone(),
                sharding_count: options.nodes.len().to_string(),
            };
            database.rules.insert(table.clone(), rule);
        }
        let users = options.users.iter();
        let users = users.map(|user| (user.name.clone(), user.password.clone()));
        Arc::new(Self {
            shared: Mutex::new(Shared {
                state: ClusterState::Ok,
                locks: 0,
                members: Vec::new(),
                databases: BTreeMap::from([(options.database.clone(), database)]),
                users: users.collect(),
                transaction: options.transaction,
                clock: options.clock,
                props: FIRST_PROPS.to_owned(),
                failing_imports: BTreeMap::new(),
                drops: 0,
                instances: Vec::new(),
            }),
            mutex: Semaphore::new(1),
            holders: watch::Sender::new(0),
            faults: Faults::default(),
            csn: AtomicI64::new(FIRST_CSN),
            host: options.listed_host.clone(),
            listed_after_kill: options.listed_after_kill,
            listed_after_cut: options.listed_after_cut,
        })
    }

    pub(super) fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().expect("no panic")
    }

    pub(super) fn state(&self) -> ClusterState {
        self.shared().state
    }

    /// Writes the state; the proxies see it when they see it, `after` from now at the earliest.
    pub(super) fn write(&self, state: ClusterState, after: Duration) {
        let instances = {
            let mut shared = self.shared();
            shared.state = state;
            shared.locks += usize::from(state != ClusterState::Ok);
            shared
                .instances
                .retain(|instance| instance.strong_count() > 0);
            shared.instances.clone()
        };
        let step = match state {
            ClusterState::Ok => Step::Accepts,
            ClusterState::ReadOnly | ClusterState::Unavailable => Step::Refuses,
        };
        for instance in instances.iter().filter_map(Weak::upgrade) {
            instance.follow(step, after);
        }
    }

    pub(super) fn password_of(&self, user: &str) -> Option<String> {
        self.shared().users.get(user).cloned()
    }

    pub(super) fn has_database(&self, name: &str) -> bool {
        let shared = self.shared();
        let found = shared.databases.get(name);
        name == "postgres" || found.is_some_and(|database| database.usable <= Instant::now())
    }

    pub(super) fn database(&self, name: &str) -> Option<Database> {
        self.shared().databases.get(name).cloned()
    }

    /// Takes the internal mutex and runs `work`; `None`: it was not to be had within `patience`.
    pub(super) async fn exclusively<T>(
        &self,
        patience: Duration,
        work: impl Future<Output = T>,
    ) -> Option<T> {
        let mut holders = self.holders.subscribe();
        let taken = tokio::time::timeout(patience, async {
            loop {
                let permit = self.mutex.acquire().await.ok()?;
                if *holders.borrow_and_update() == 0 {
                    return Some(permit);
                }
                drop(permit);
                holders.changed().await.ok()?;
            }
        });
        let _permit = taken.await.ok().flatten()?;
        Some(work.await)
    }

    /// Takes the internal mutex away from everybody, for a test.
    pub(super) fn hold(&self) {
        self.holders.send_modify(|holders| *holders += 1);
    }

    pub(super) fn release(&self) {
        self.holders.send_modify(|holders| *holders -= 1);
    }

    /// Adds a proxy that has started.
    pub(super) fn join(&self, instance: &Arc<Instance>) {
        let mut shared = self.shared();
        shared.members.push(Member {
            id: instance.id.clone(),
            port: instance.port,
            worker: instance.index,
            until: None,
        });
        shared.instances.push(Arc::downgrade(instance));
    }

    /// Nothing is heard of a proxy any more: it was killed, frozen, or cut off.
    pub(super) fn silent(&self, instance: &Instance, cut_off: bool) {
        let patience = if cut_off {
            self.listed_after_cut
        } else {
            self.listed_after_kill
        };
        let until = Some(Instant::now() + patience);
        for member in &mut self.shared().members {
            if member.id == instance.id && member.until.is_none() {
                member.until = until;
            }
        }
    }

    /// A proxy is heard of again.
    pub(super) fn heard(&self, instance: &Instance) {
        let mut shared = self.shared();
        shared.members.retain(|member| member.id != instance.id);
        shared.members.push(Member {
            id: instance.id.clone(),
            port: instance.port,
            worker: instance.index,
            until: None,
        });
    }

    /// The proxies that are listed now.
    pub(super) fn members(&self) -> Vec<Member> {
        let mut shared = self.shared();
        let now = Instant::now();
        shared
            .members
            .retain(|member| member.until.is_none_or(|until| until > now));
        shared.members.clone()
    }

    /// All proxies that run.
    pub(super) fn instances(&self) -> Vec<Arc<Instance>> {
        let shared = self.shared();
        shared.instances.iter().filter_map(Weak::upgrade).collect()
    }

    /// Drops a logical database; `false`: there is none.
    pub(super) fn drop_database(&self, name: &str) -> bool {
        let mut shared = self.shared();
        let found = shared.databases.remove(name).is_some();
        if found && !shared.failing_imports.contains_key(name) {
            let failing = TRIES[shared.drops % TRIES.len()] - 1;
            shared.drops += 1;
            shared.failing_imports.insert(name.to_owned(), failing);
        }
        found
    }
}
