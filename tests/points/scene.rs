//! Two nodes that ship their WAL all the time, transfers between them, and rows that say between which points they came.

use std::fs;
use std::time::Duration;

use serde_json::Value;
use support::bucket::Bucket;
use support::fleet::{Fleet, Run};
use support::os;
use support::postgres::{self, Cluster, ClusterOptions, Installation};
use tokio_postgres::Client;

use crate::transfers::{self, Transfers};

#[expect(clippy::print_stdout, reason = "shown by --nocapture and on failure")]
pub(crate) fn say(text: &str) {
    println!("{text}");
}

pub(crate) struct Scene {
    pub(crate) bucket: Bucket,
    pub(crate) fleet: Fleet,
    pub(crate) nodes: String,
    round: usize,
}

impl Scene {
    pub(crate) async fn start(name: &str) -> Self {
        let bucket = Bucket::best().await;
        let mut fleet = Fleet::new(name, &bucket.config());
        let installation = Installation::newest();
        for name in ["node1", "node2"] {
            let options = ClusterOptions {
                settings: vec![("max_prepared_transactions".to_owned(), "50".to_owned())],
                ..ClusterOptions::default()
            };
            let host = fleet.add_database(name, &installation, options);
            let cluster = fleet.hosts[host].cluster.as_ref().unwrap();
            transfers::prepare(cluster).await;
            cluster
                .execute("CREATE TABLE moment (number int PRIMARY KEY)")
                .await;
        }
        let nodes = fleet.addresses(&[0, 1]);
        fleet.add_host("beside", &[]);
        Self {
            bucket,
            fleet,
            nodes,
            round: 0,
        }
    }

    pub(crate) fn databases(&self) -> [&Cluster; 2] {
        [0, 1].map(|number| self.fleet.hosts[number].cluster.as_ref().unwrap())
    }

    pub(crate) fn run(&self, args: &[&str]) -> Run {
        let more = ["--nodes", &self.nodes, "--output", "json"];
        self.fleet.run(&[args, &more].concat())
    }

    /// Runs a command that names no agents.
    pub(crate) fn ask(&self, args: &[&str]) -> Run {
        self.fleet.run(&[args, &["--output", "json"]].concat())
    }

    /// A backup, after which WAL is shipped all the time.
    pub(crate) fn backup(&self) -> String {
        let run = self.run(&["backup", "--wal", "continuous", "--point-timeout", "60"]);
        let result = run.good().result();
        result["backup_id"].as_str().unwrap().to_owned()
    }

    /// Writes on both nodes that the next point comes after this.
    pub(crate) async fn moment(&self, number: usize) {
        for cluster in self.databases() {
            let sql = format!("INSERT INTO moment VALUES ({number})");
            cluster.execute(&sql).await;
        }
    }

    /// A point under whatever load there is.
    pub(crate) fn point(&self, label: &str) -> Value {
        let args = ["point", "create", "--label", label, "--point-timeout", "60"];
        self.run(&args).good().result()
    }

    pub(crate) async fn load(&self) -> Transfers {
        Transfers::start(&self.databases(), 2, Duration::from_millis(150)).await
    }

    /// Restores beside the sources with `what`, and gives clients of the restored databases to `look`.
    pub(crate) async fn restored(&mut self, what: &[&str], wanted: usize) {
        self.round += 1;
        let host = &self.fleet.hosts[2];
        let target = host.root.join(format!("round{}", self.round));
        fs::create_dir(&target).unwrap();
        os::give(&target);
        let address = host.agent.address.clone();
        let target_text = target.display().to_string();
        let mut args = vec![
            "restore",
            "--target-dir",
            &target_text,
            "--yes",
            "--nodes",
            &address,
        ];
        args.extend(what);
        let ports = [os::free_port(), os::free_port()];
        let mut more = Vec::new();
        for (cluster, port) in self.databases().iter().zip(ports) {
            let source = self.source(cluster);
            more.extend(["--map".to_owned(), format!("{source}={address}")]);
            more.extend(["--db-port".to_owned(), format!("{source}={port}")]);
        }
        args.extend(more.iter().map(String::as_str));
        args.extend(["--output", "json"]);
        let result = self.fleet.run(&args).good().result();
        let mut clients = Vec::new();
        let mut data = Vec::new();
        for node in result["nodes"].as_array().unwrap() {
            let directory = std::path::PathBuf::from(node["data_directory"].as_str().unwrap());
            let (socket, port) = postgres::running(&directory);
            clients.push(postgres::connect(&socket, port, "postgres").await);
            data.push(directory);
        }
        let transfers = transfers::check_proved(&clients).await;
        let transfers = transfers.unwrap_or_else(|wrong| panic!("{what:?}: {wrong}"));
        for client in &clients {
            assert_eq!(moments(client).await, wanted, "{what:?}: {result}");
        }
        say(&format!(
            "{what:?}: {wanted} moments, {transfers} transfers"
        ));
        drop(clients);
        for directory in data {
            let mut command = os::command(Installation::newest().bindir.join("pg_ctl"));
            let stop = command
                .args(["stop", "-w", "-m", "immediate", "-D"])
                .arg(&directory);
            assert!(stop.output().unwrap().status.success());
        }
        fs::remove_dir_all(&target).unwrap();
    }

    /// A node's source as `--map` wants it: by its id.
    fn source(&self, cluster: &Cluster) -> String {
        let shown = self.ask(&["show"]).good().result();
        let backups = shown["backups"].as_array().unwrap();
        let mut nodes = backups
            .iter()
            .flat_map(|it| it["nodes"].as_array().unwrap());
        let port = u64::from(cluster.port());
        let node = nodes.rfind(|node| node["port"].as_u64() == Some(port));
        node.unwrap()["node_id"].as_str().unwrap().to_owned()
    }

    /// Points as `point list` has them.
    pub(crate) fn points(&self) -> Vec<Value> {
        let listed = self.ask(&["point", "list"]).good().result();
        listed["points"].as_array().unwrap().clone()
    }
}

/// How many moments there are; they are numbered from 1 without a hole.
async fn moments(client: &Client) -> usize {
    let sql = "SELECT count(*), coalesce(max(number), 0)::bigint FROM moment";
    let row = client.query_one(sql, &[]).await.unwrap();
    let (count, last): (i64, i64) = (row.get(0), row.get(1));
    assert_eq!(count, last);
    usize::try_from(count).unwrap()
}

pub(crate) fn id(value: &Value) -> &str {
    value["point_id"].as_str().unwrap()
}
