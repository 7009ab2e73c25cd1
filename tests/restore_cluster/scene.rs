//! A cluster with a backup, and clients that go on while it is restored.

use std::time::{Duration, Instant};

use jiff::Timestamp;
use support::bank::wire::Session;
use support::bank::{self, Bank, BankOptions, Diary, Mix, Outcome, Window};
use support::fleet::Run;
use support::real_proxy::DATABASE;
use support::running::Running;
use support::sharded::{Proxies, SHARD, ShardedCluster, ShardedOptions};

/// The shortest that there is: what a test waits for after it has killed who locked.
pub(crate) const LOCK_TIMEOUT: &str = "15";
/// Leases of what was killed have run out this soon.
const LEASES: Duration = Duration::from_secs(40);

#[expect(clippy::print_stdout, reason = "shown by --nocapture and on failure")]
pub(crate) fn say(text: &str) {
    println!("{text}");
}

/// A cluster, and a backup of its untouched accounts.
pub(crate) struct Scene {
    pub(crate) cluster: ShardedCluster,
    pub(crate) backup: String,
}

impl Scene {
    pub(crate) async fn start(name: &'static str) -> Self {
        let options = ShardedOptions {
            name,
            ..ShardedOptions::default()
        };
        let cluster = ShardedCluster::start(options).await;
        let args = ["--output", "json", "backup", "--wal", "backup"];
        let made = cluster.run(&args).good().result();
        assert_eq!(made["consistency"], "cluster", "{made}");
        let backup = made["backup_id"].as_str().unwrap().to_owned();
        Self { cluster, backup }
    }

    /// A restore of the backup, under way.
    pub(crate) fn restoring(&self, more: &[&str]) -> Running {
        let args = [
            "--output",
            "json",
            "restore",
            "--id",
            &self.backup,
            "--yes",
            "--lease-ttl",
            "5",
            "--lock-timeout",
            LOCK_TIMEOUT,
        ];
        Running::start(self.cluster.command(&[&args, more].concat()))
    }

    /// Well-behaved clients through all proxies, none of whose writes pass a lock.
    pub(crate) async fn bank(&self, shift: i64) -> Bank {
        let options = BankOptions {
            seed: 9,
            mix: Mix {
                simple: 2,
                prepared: 2,
                autocommit: 2,
                ..Mix::default()
            },
            pause: Duration::from_millis(20),
            passing_pause: Duration::from_millis(200),
            shift,
        };
        let bank = Bank::open(&self.cluster.ways(), &options);
        bank.goes_on(20).await;
        bank
    }

    /// Whatever clients were told is committed, of what they began after `locked`, is there, and whole.
    pub(crate) async fn assert_kept(&self, diary: &Diary, locked: Timestamp) {
        let mut known = Diary::default();
        let (mut told, mut before) = (0, 0);
        for entry in &diary.entries {
            let mut entry = *entry;
            if entry.begun < locked {
                // It went into a database that was thrown away; and whoever began it was told so by nobody.
                entry.outcome = Outcome::Unknown;
                before += 1;
            } else if matches!(entry.outcome, Outcome::Acknowledged(_)) {
                told += 1;
            }
            known.entries.push(entry);
        }
        let mut nodes = Vec::new();
        for database in self.cluster.databases() {
            nodes.push(database.connect(SHARD).await);
        }
        let all = Window {
            from: Timestamp::MAX,
            to: Timestamp::MAX,
        };
        let verdict = bank::check(&nodes, &known, all).await;
        let verdict = verdict.unwrap_or_else(|wrong| panic!("{wrong}"));
        say(&format!(
            "{before} transfers begun before the lock, {told} committed since: {verdict:?}"
        ));
        assert!(before > 0 && told > 0, "{}", diary.describe());
        assert_eq!(verdict.required, told);
    }

    /// A write and a look through every proxy.
    pub(crate) async fn passes(&self) -> Result<(), String> {
        for number in 0..self.cluster.proxy_count() {
            self.passes_through(number).await?;
        }
        Ok(())
    }

    async fn passes_through(&self, number: usize) -> Result<(), String> {
        let access = self.cluster.access(number, DATABASE);
        let both = async {
            let mut session = Session::open(&access).await?;
            session
                .query("UPDATE account SET balance = balance WHERE id = 0")
                .await?;
            session.query("SELECT count(*) FROM account").await
        };
        match tokio::time::timeout(Duration::from_secs(5), both).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("no answer".to_owned()),
        }
    }

    /// Writes pass through every proxy after an import. A real one that has missed it is started again, as a person is told to.
    pub(crate) async fn until_usable(&mut self) {
        for number in 0..self.cluster.proxy_count() {
            let (mut begun, mut restarted) = (Instant::now(), false);
            while let Err(why) = self.passes_through(number).await {
                let late = begun.elapsed() > Duration::from_secs(30);
                let real = matches!(self.cluster.proxies, Proxies::Real(_));
                if late && real && !restarted {
                    say(&format!("proxy {number} is started again: {why}"));
                    self.cluster.restart_proxy(number).await;
                    (begun, restarted) = (Instant::now(), true);
                } else {
                    assert!(!late, "proxy {number} does not read the import: {why}");
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }

    /// Writes pass through every proxy within `limit`.
    pub(crate) async fn until_writes_pass(&self, limit: Duration) -> Duration {
        let begun = Instant::now();
        while let Err(why) = self.passes().await {
            assert!(begun.elapsed() < limit, "writes are still refused: {why}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        begun.elapsed()
    }

    /// Waits until the leases of commands that were killed have run out. The newest restore.
    pub(crate) async fn left(&self) -> String {
        let begun = Instant::now();
        loop {
            let shown = self.cluster.run(&["--output", "json", "operations"]).good();
            let result = shown.result();
            let operations = result["operations"].as_array().unwrap();
            let restores = operations.iter().filter(|it| it["kind"] == "restore");
            let newest = restores.max_by_key(|it| it["operation"].as_str().unwrap());
            if let Some(newest) = newest
                && newest["state"] != "running"
            {
                assert_eq!(newest["state"], "left", "{result}");
                return newest["operation"].as_str().unwrap().to_owned();
            }
            assert!(begun.elapsed() < LEASES, "{result}");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    pub(crate) fn resume(&self, operation: &str) -> Run {
        let args = ["--output", "json", "operations", "resume", operation];
        let more = ["--yes", "--lock-timeout", LOCK_TIMEOUT];
        self.cluster.run(&[&args[..], &more].concat()).good()
    }
}

/// Reads on until the cluster is locked. When that was, at the latest.
pub(crate) async fn until_locked(running: &mut Running) -> Timestamp {
    running
        .until_event(|event| event["event"] == "locked")
        .await;
    Timestamp::now()
}
