//! A real openGauss from its backup to its point, by the very code of a restore. Runs where `gaussdb` and `gs_probackup` are
//! on `PATH`, as a user that is not root; about a minute and a half.

#![allow(
    clippy::format_push_string,
    reason = "it writes one configuration file"
)]

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::Command;

use agent_api::{Place, RestoreSpec};
use agent_wal::kind::restore_point;
use agent_wal::record::{ReaderOptions, RecordReader, Step};
use agent_wal::{Lsn, SegmentName, SegmentSize};
use serde_json::json;
use support::skip::skip;

use super::*;
use crate::config::Config;
use crate::restore::live::Live;
use crate::restore::recoverer::Recoverer;
use crate::restore::settings::{Action, Places, Standalone};
use crate::restore::target::Plan;
use crate::restore::walserve::{Needed, WalServer};
use crate::restore::workspace::Workspace;
use crate::restore::workspace::tests::{journal, spec};
use crate::restore::{prepare, promote};
use crate::walget::WalFile;

const TEST: &str = "a_real_opengauss_is_recovered_to_its_point";
const POINT: &str = "gs_pitr_real";

/// Why it cannot run, or where the programs are.
fn programs() -> Result<(PathBuf, PathBuf), &'static str> {
    if rustix::process::geteuid().is_root() {
        return Err("openGauss does not run as root");
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let bindir = std::env::split_paths(&path).find(|directory| {
        directory.join("gaussdb").is_file() && directory.join("gs_probackup").is_file()
    });
    let agent = std::env::current_exe().ok();
    let agent = agent.and_then(|exe| Some(exe.parent()?.parent()?.join("pitr-agent")));
    let agent = agent.filter(|agent| agent.is_file());
    Ok((
        bindir.ok_or("gaussdb and gs_probackup are not on PATH")?,
        agent.ok_or("pitr-agent is not built")?,
    ))
}

struct Node {
    bindir: PathBuf,
    root: PathBuf,
    port: u16,
}

impl Node {
    fn run(&self, program: &str, arguments: &[&str]) -> String {
        let output = Command::new(self.bindir.join(program))
            .args(arguments)
            .current_dir(&self.root)
            .stdin(std::process::Stdio::null())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "{program} {arguments:?}: {text}{error}"
        );
        text
    }

    fn path(&self, name: &str) -> String {
        self.root.join(name).to_str().unwrap().to_owned()
    }

    fn sql(&self, sql: &str) -> String {
        let (sockets, port) = (self.path("sock"), self.port.to_string());
        let user = facts::os_user();
        self.run(
            "gsql",
            &[
                "-h", &sockets, "-p", &port, "-U", &user, "-d", "postgres", "-At", "-c", sql,
            ],
        )
    }

    fn start(&self) {
        let (data, log) = (self.path("data"), self.path("log"));
        self.run(
            "gs_ctl",
            &[
                "start",
                "-D",
                &data,
                "-Z",
                "single_node",
                "-l",
                &log,
                "-t",
                "120",
            ],
        );
    }

    fn make(&self) {
        for name in ["sock", "archive"] {
            fs::create_dir(self.root.join(name)).unwrap();
        }
        let data = self.path("data");
        let user = facts::os_user();
        let initdb = [
            "-D",
            &data,
            "--nodename=n1",
            "-w",
            "Gauss_2345",
            "-U",
            &user,
            "--locale=C",
            "-E",
            "UTF8",
        ];
        self.run("gs_initdb", &initdb);
        let conf = self.root.join("data/postgresql.conf");
        let mut text = fs::read_to_string(&conf).unwrap();
        text += &format!(
            "\nport={}\nlisten_addresses='127.0.0.1'\nunix_socket_directory='{}'\nmax_process_memory=2GB\nshared_buffers=128MB\n\
             cstore_buffers=16MB\nmax_connections=100\nwal_level=hot_standby\nmax_wal_senders=4\narchive_mode=on\n\
             archive_command='cp %p {}/%f'\n",
            self.port,
            self.path("sock"),
            self.path("archive")
        );
        fs::write(conf, text).unwrap();
        self.start();
    }

    /// Backs it up, and makes a point that only its archive leads to; where the point's record ends.
    fn back_up(&self) -> Lsn {
        self.sql("create table t(i int); insert into t select generate_series(1, 1000)");
        let (catalog, data, port) = (
            self.path("catalog"),
            self.path("data"),
            self.port.to_string(),
        );
        let (sockets, user) = (self.path("sock"), facts::os_user());
        let instance = ["-B", &catalog, "--instance", "i"];
        self.run("gs_probackup", &["init", "-B", &catalog]);
        self.run(
            "gs_probackup",
            &[&["add-instance", "-D", &data][..], &instance].concat(),
        );
        let from = ["-h", &sockets, "-p", &port, "-U", &user, "-d", "postgres"];
        let how = ["backup", "-b", "FULL", "--no-validate", "--no-sync"];
        self.run("gs_probackup", &[&how[..], &instance, &from].concat());
        self.sql("insert into t select generate_series(1001, 1500)");
        let end = self.sql(&format!("select pg_create_restore_point('{POINT}')"));
        self.sql("insert into t values (9999)");
        self.sql("select pg_switch_xlog()");
        end.parse().unwrap()
    }
}

/// WAL from a directory.
#[derive(Debug, Clone)]
struct Archive(PathBuf);

impl WalSource for Archive {
    async fn fetch(&self, file: &WalFile, into: &Path) -> Result<Option<u64>, ApiError> {
        match fs::copy(self.0.join(file.name()), into) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(local(into, &error)),
        }
    }
}

/// Where the record of the point begins that ends at `end`.
fn record_start(archive: &Path, first: Lsn, end: Lsn) -> Lsn {
    let size = SegmentSize::DEFAULT;
    let mut reader = RecordReader::new(first, ReaderOptions::new(size));
    loop {
        let step = reader.step_with(|number| {
            fs::read(
                archive.join(
                    SegmentName {
                        timeline: 1,
                        number,
                    }
                    .format(size),
                ),
            )
            .map(Some)
        });
        let Step::Record(record) = step.unwrap() else {
            panic!("the archive does not lead to {end}");
        };
        if record.end == end {
            assert_eq!(restore_point(&record).unwrap().name, POINT);
            return record.start;
        }
    }
}

fn plan_of(bindir: PathBuf, target: &Path, (start, end): (Lsn, Lsn), fork: Lsn) -> Plan {
    let size = SegmentSize::DEFAULT;
    Plan {
        target: target.to_owned(),
        mount: false,
        live: None,
        recoverer: Recoverer::OpenGauss,
        bindir,
        segment_size: size,
        start,
        end,
        fork,
        needed: Needed {
            first: SegmentName::of_lsn(1, start, size),
            last: SegmentName::before_lsn(1, end, size),
            size,
        },
    }
}

/// What a manifest and a point would say of it.
fn spec_of(target: &Path, data: &Path, (record, end): (Lsn, Lsn)) -> (RestoreSpec, Lsn) {
    let control = prove::read_control(data).unwrap();
    let label = fs::read_to_string(data.join("backup_label")).unwrap();
    let start = label.split_whitespace().nth(3).unwrap().to_owned();
    let mut spec = serde_json::to_value(spec(target, Place::Fresh)).unwrap();
    let node = &mut spec["node"];
    node["flavour"] = json!("opengauss");
    node["server_version_num"] = json!(90_204);
    node["system_identifier"] = json!(control.system_identifier.to_string());
    node["control_version"] = json!(control.control_version);
    node["catalog_version"] = json!(control.catalog_version);
    node["start_lsn"] = json!(start);
    node["backup_label"] = json!(label);
    spec["point"]["restore_point"] = json!(POINT);
    spec["point"]["record_lsn"] = json!(record.to_string());
    spec["point"]["end_lsn"] = json!(end.to_string());
    (
        serde_json::from_value(spec).unwrap(),
        start.parse().unwrap(),
    )
}

fn label_start(data: &Path) -> Lsn {
    let label = fs::read_to_string(data.join("backup_label")).unwrap();
    label.split_whitespace().nth(3).unwrap().parse().unwrap()
}

#[expect(
    clippy::too_many_lines,
    reason = "one story from its beginning to its end"
)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_opengauss_is_recovered_to_its_point() {
    let (bindir, agent) = match programs() {
        Ok(found) => found,
        Err(why) => return skip(TEST, why),
    };
    let here = tempfile::Builder::new().prefix("og").tempdir().unwrap();
    let root = here.path().canonicalize().unwrap();
    let node = Node {
        bindir: bindir.clone(),
        root: root.clone(),
        port: free_ports().unwrap(),
    };
    node.make();
    let end = node.back_up();
    let live = Live::look(&root.join("data")).await.unwrap().unwrap();
    assert!(live.running && live.port == Some(node.port));
    let live = Live {
        bindir: bindir.clone(),
        ..live
    };
    assert_eq!(live.ask("pgxc_node_name").await.as_deref(), Some("n1"));
    live.stop(&Config::default()).await.unwrap();

    let target = root.join("restored");
    let first = spec(&target, Place::Fresh);
    let mut begun = serde_json::to_value(&first).unwrap();
    begun["node"]["flavour"] = json!("opengauss");
    let begun: RestoreSpec = serde_json::from_value(begun).unwrap();
    let workspace = Workspace::create(journal(&begun, false), &begun).unwrap();
    let places = workspace.places.clone();
    let catalog = node.path("catalog");
    let into = places.data.to_str().unwrap();
    let restore = [
        "restore",
        "-B",
        &catalog,
        "--instance",
        "i",
        "-D",
        into,
        "--no-validate",
    ];
    node.run("gs_probackup", &restore);
    // As a restore takes it away.
    fs::remove_dir_all(places.data.join("pg_xlog")).unwrap();
    let archive = root.join("archive");
    let record = record_start(&archive, label_start(&places.data), end);
    let (spec, start) = spec_of(&target, &places.data, (record, end));
    let plan = plan_of(bindir.clone(), &target, (start, end), record);
    prepare::finish(&places, &plan, &spec).unwrap();

    let (cancel, socket) = (CancellationToken::new(), workspace.run().join("wal.sock"));
    let wal = WalServer::start(
        Archive(archive),
        plan.needed,
        HashMap::new(),
        &socket,
        &places.spool,
        &cancel,
    );
    let wal = wal.unwrap();
    let recovery = Recovery {
        plan: &plan,
        workspace: &workspace,
        places: Places {
            data: places.data.clone(),
            config: None,
            hba: places.hba.clone(),
            ident: places.ident.clone(),
        },
        source: &[],
        wal: &wal,
        socket: &socket,
        program: &agent,
        cancel: &cancel,
    };
    let to = |action| RecoveryTarget {
        name: POINT.to_owned(),
        timeline: 1,
        action,
    };
    recovery
        .to_point(&to(Action::Shutdown), &mut |_| {})
        .await
        .unwrap();
    let control = prove::read_control(&places.data).unwrap();
    prove::prove(&control, &spec, &plan).unwrap();
    // A proof of another point is none.
    let other = Plan {
        fork: end,
        ..plan.clone()
    };
    assert!(prove::prove(&control, &spec, &other).is_err());
    assert!(promote::settle(&places.data, &spec, &plan).is_err());
    recovery.promote(&to(Action::Promote)).await.unwrap();
    let promoted = promote::settle(&places.data, &spec, &plan).unwrap();
    assert_eq!((promoted.timeline, promoted.fork), (1, record));
    wal.stop().await;
    assert!(!places.data.join("recovery.done").exists());

    // In its place, and open.
    fs::rename(&places.data, &target).unwrap();
    let standalone = Standalone {
        recoverer: Recoverer::OpenGauss,
        bindir: &bindir,
        places: &Places {
            data: target.clone(),
            config: None,
            hba: target.join("pg_hba.conf"),
            ident: target.join("pg_ident.conf"),
        },
        source: &[],
        port: node.port,
        socket_directory: None,
        log: &places.server_log,
    };
    let (argv, log) = (standalone.argv(), &places.server_log);
    let open = promote::open(Recoverer::OpenGauss, &argv, &target, log);
    open.await.unwrap();
    assert_eq!(node.sql("select count(*), max(i) from t"), "1500|1500");
    let restored = Live::look(&target).await.unwrap().unwrap();
    let restored = Live { bindir, ..restored };
    restored.stop(&Config::default()).await.unwrap();
    assert!(!Live::runs(&target).await.unwrap());
}
