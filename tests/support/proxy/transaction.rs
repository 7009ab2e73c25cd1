//! Transactions over several nodes: LOCAL (commit after commit) and XA (two phases).

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::instance::Instance;
use super::node::{Answer, Lease};
use super::wire::{Body, Refusal};
use super::{Clock, DataNode, Transaction as Kind};

/// "ATOM": the format of Atomikos's identifiers.
const FORMAT: u32 = 1_096_044_365;

/// A transaction of a client, begun on a node when its first statement gets there.
pub(super) struct Transaction {
    kind: Kind,
    /// A statement failed: it can only be rolled back.
    pub failed: bool,
    members: Vec<Lease>,
    savepoints: Vec<String>,
}

/// What Atomikos writes down: it outlives the proxy's process.
#[derive(Debug)]
pub(super) struct XaLog {
    /// Unique among transaction managers.
    name: String,
    count: AtomicU64,
    /// Begun and not ended.
    active: Mutex<HashSet<String>>,
    /// Decided to be committed, and perhaps not committed everywhere.
    committing: Mutex<HashSet<String>>,
}

impl XaLog {
    pub(super) fn new(port: u16) -> Arc<Self> {
        Arc::new(Self {
            name: format!("127.0.0.1.{port}.tm"),
            count: AtomicU64::new(1),
            active: Mutex::default(),
            committing: Mutex::default(),
        })
    }

    fn begin(&self) -> String {
        let number = self.count.fetch_add(1, Ordering::Relaxed);
        let id = format!("{}{number:010}", self.name);
        self.active.lock().expect("no panic").insert(id.clone());
        id
    }

    fn end(&self, id: &str) {
        self.committing.lock().expect("no panic").remove(id);
        self.active.lock().expect("no panic").remove(id);
    }

    /// Decided, and nobody at work on it.
    fn left(&self) -> Vec<String> {
        let active = self.active.lock().expect("no panic").clone();
        let committing = self.committing.lock().expect("no panic");
        committing.difference(&active).cloned().collect()
    }

    fn gid(id: &str, branch: usize) -> String {
        let branch = format!("{id}{branch}");
        let (id, branch) = (STANDARD.encode(id), STANDARD.encode(branch));
        format!("{FORMAT}_{id}_{branch}")
    }

    /// The transaction a prepared one belongs to, if it is of this log.
    fn owner(&self, gid: &str) -> Option<String> {
        let mut parts = gid.strip_prefix(&format!("{FORMAT}_"))?.split('_');
        let id = STANDARD.decode(parts.next()?).ok()?;
        let id = String::from_utf8(id).ok()?;
        id.starts_with(&self.name).then_some(id)
    }
}

impl Transaction {
    pub(super) fn begin(kind: Kind) -> Self {
        Self {
            kind,
            failed: false,
            members: Vec::new(),
            savepoints: Vec::new(),
        }
    }

    /// The session of `node` in this transaction.
    pub(super) async fn on(
        &mut self,
        proxy: &Arc<Instance>,
        node: &DataNode,
    ) -> Result<&mut Lease, Refusal> {
        let found = self.members.iter().position(|lease| lease.node() == node);
        let index = if let Some(index) = found {
            index
        } else {
            let mut lease = proxy.pool_of(node).take().await?;
            lease.simple("BEGIN").await?;
            for savepoint in &self.savepoints {
                lease.simple(&format!("SAVEPOINT \"{savepoint}\"")).await?;
            }
            self.members.push(lease);
            self.members.len() - 1
        };
        Ok(&mut self.members[index])
    }

    pub(super) async fn savepoint(&mut self, name: &str) -> Result<(), Refusal> {
        self.everywhere(&format!("SAVEPOINT \"{name}\"")).await?;
        self.savepoints.push(name.to_owned());
        Ok(())
    }

    pub(super) async fn roll_back_to(&mut self, name: &str) -> Result<(), Refusal> {
        let sql = format!("ROLLBACK TO SAVEPOINT \"{name}\"");
        self.everywhere(&sql).await?;
        self.failed = false;
        if let Some(at) = self.savepoints.iter().rposition(|known| known == name) {
            self.savepoints.truncate(at + 1);
        }
        Ok(())
    }

    pub(super) async fn release(&mut self, name: &str) -> Result<(), Refusal> {
        self.everywhere(&format!("RELEASE SAVEPOINT \"{name}\""))
            .await?;
        if let Some(at) = self.savepoints.iter().rposition(|known| known == name) {
            self.savepoints.truncate(at);
        }
        Ok(())
    }

    async fn everywhere(&mut self, sql: &str) -> Result<(), Refusal> {
        for lease in &mut self.members {
            lease.simple(sql).await?;
        }
        Ok(())
    }

    pub(super) async fn roll_back(mut self) -> Result<(), Refusal> {
        let mut result = Ok(());
        for lease in &mut self.members {
            result = result.and(lease.simple("ROLLBACK").await.map(|_| ()));
        }
        self.give_back();
        result
    }

    /// Commits, or rolls back what has failed: `true` if it did commit.
    pub(super) async fn commit(mut self, proxy: &Arc<Instance>) -> Result<bool, Refusal> {
        if self.failed {
            self.roll_back().await?;
            return Ok(false);
        }
        let result = match self.kind {
            // One branch needs no second phase.
            Kind::Xa if self.members.len() > 1 => self.commit_in_two_phases(proxy).await,
            Kind::Xa | Kind::Local => self.commit_one_by_one(proxy).await,
        };
        self.give_back();
        advance(proxy);
        result.map(|()| true)
    }

    /// Commits a batch's share of one node, or rolls it back. The clock knows nothing of it.
    pub(super) async fn commit_share(mut self) -> Result<(), Refusal> {
        let sql = if self.failed { "ROLLBACK" } else { "COMMIT" };
        let result = self.everywhere(sql).await;
        self.give_back();
        result
    }

    /// A node that fails does not keep the others from committing.
    async fn commit_one_by_one(&mut self, proxy: &Arc<Instance>) -> Result<(), Refusal> {
        let mut result = Ok(());
        for lease in &mut self.members {
            proxy.thawed().await;
            result = result.and(lease.simple("COMMIT").await.map(|_| ()));
        }
        result
    }

    /// As PostgreSQL's driver and Atomikos do it: branches that only read are prepared, too.
    async fn commit_in_two_phases(&mut self, proxy: &Arc<Instance>) -> Result<(), Refusal> {
        let id = proxy.xa.begin();
        for (branch, lease) in self.members.iter_mut().enumerate() {
            proxy.thawed().await;
            let sql = format!("PREPARE TRANSACTION '{}'", XaLog::gid(&id, branch));
            if let Err(refusal) = lease.simple(&sql).await {
                self.abandon(&id, branch).await;
                proxy.xa.end(&id);
                return Err(refusal);
            }
        }
        let decided = &proxy.xa.committing;
        decided.lock().expect("no panic").insert(id.clone());
        let mut failed = None;
        for (branch, lease) in self.members.iter_mut().enumerate() {
            proxy.thawed().await;
            let sql = format!("COMMIT PREPARED '{}'", XaLog::gid(&id, branch));
            failed = failed.or(lease.simple(&sql).await.err());
        }
        match failed {
            None => {
                proxy.xa.end(&id);
                Ok(())
            }
            // It is decided: recovery goes on with it.
            Some(refusal) => {
                proxy.xa.active.lock().expect("no panic").remove(&id);
                Err(refusal)
            }
        }
    }

    async fn abandon(&mut self, id: &str, prepared: usize) {
        for (branch, lease) in self.members.iter_mut().enumerate() {
            let sql = if branch < prepared {
                format!("ROLLBACK PREPARED '{}'", XaLog::gid(id, branch))
            } else {
                "ROLLBACK".to_owned()
            };
            // What cannot be reached is left to recovery.
            let _ = lease.simple(&sql).await;
        }
    }

    fn give_back(&mut self) {
        for lease in self.members.drain(..) {
            lease.give_back();
        }
    }
}

/// The clock goes on at each COMMIT.
fn advance(proxy: &Instance) {
    let clock = proxy.registry.shared().clock;
    match clock {
        Clock::Off => {}
        Clock::TsoRedis => {
            proxy.registry.csn.fetch_add(1, Ordering::Relaxed);
        }
        Clock::TsoLocal => {
            proxy.csn.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Ends what a proxy left in doubt when it died or lost a node: first at its start, then every ten seconds. What the log
/// says was decided is committed, all else rolled back.
pub(super) async fn recover(proxy: Arc<Instance>) {
    proxy.xa.active.lock().expect("no panic").clear();
    let mut every = tokio::time::interval(Duration::from_secs(10));
    loop {
        every.tick().await;
        proxy.thawed().await;
        let decided = proxy.xa.left();
        if proxy.xa.count.load(Ordering::Relaxed) == 1 {
            continue;
        }
        let databases = proxy.registry.shared().databases.clone();
        let nodes: HashSet<DataNode> = databases
            .into_values()
            .flat_map(|database| database.units.into_values())
            .collect();
        let mut reached = true;
        for node in nodes {
            reached &= recover_on(&proxy, &node).await.is_ok();
        }
        if reached {
            for id in &decided {
                proxy.xa.end(id);
            }
        }
    }
}

async fn recover_on(proxy: &Arc<Instance>, node: &DataNode) -> Result<(), Refusal> {
    let mut lease = proxy.pool_of(node).take().await?;
    let sql = "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()";
    let answer: Answer = lease.simple(sql).await?;
    for row in answer.rows {
        let gid = Body(row).values().unwrap_or_default().into_iter().next();
        let gid = gid.flatten().unwrap_or_default();
        let gid = String::from_utf8_lossy(&gid).into_owned();
        let Some(id) = proxy.xa.owner(&gid) else {
            continue;
        };
        if proxy.xa.active.lock().expect("no panic").contains(&id) {
            continue;
        }
        let decided = proxy.xa.committing.lock().expect("no panic").contains(&id);
        let verb = if decided { "COMMIT" } else { "ROLLBACK" };
        lease.simple(&format!("{verb} PREPARED '{gid}'")).await?;
    }
    lease.give_back();
    Ok(())
}
