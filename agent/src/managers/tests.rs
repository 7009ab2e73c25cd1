//! Process tables made by hand, in a directory that looks like `/proc`.

use super::*;

struct Table(tempfile::TempDir);

impl Table {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn process(self, pid: u32, parent: u32, argv: &[&str]) -> Self {
        let directory = self.0.path().join("proc").join(pid.to_string());
        fs::create_dir_all(&directory).unwrap();
        let status = format!("Name:\tx\nPid:\t{pid}\nPPid:\t{parent}\n");
        fs::write(directory.join("status"), status).unwrap();
        fs::write(directory.join("cmdline"), argv.join("\0") + "\0").unwrap();
        self
    }

    /// A data directory whose postmaster is `pid`.
    fn pgdata(&self, pid: u32) -> PathBuf {
        let directory = self.0.path().join("data");
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join("postmaster.pid"), format!("{pid}\n/x\n")).unwrap();
        directory
    }

    fn found(&self, pgdata: &Path) -> Vec<(String, String)> {
        let managers = Processes::read(&self.0.path().join("proc")).managers(pgdata);
        assert!(managers.iter().all(|manager| !manager.next.is_empty()));
        managers
            .into_iter()
            .map(|manager| (manager.name, manager.evidence))
            .collect()
    }
}

#[test]
fn a_plain_database_has_no_manager() {
    let table = Table::new()
        .process(1, 0, &["/sbin/init"])
        .process(40, 1, &["/usr/lib/postgresql/15/bin/postgres", "-D", "/x"])
        // Supervisors of other things.
        .process(50, 1, &["/usr/bin/python3", "/usr/bin/supervisord"])
        .process(51, 1, &["/usr/bin/vim", "patroni"])
        .process(52, 1, &["/usr/sbin/pacemakerd"]);
    assert_eq!(table.found(&table.pgdata(40)), []);
    // One that is not running has none either.
    assert_eq!(table.found(&table.pgdata(4711)), []);
}

#[test]
fn what_started_the_postmaster_manages_it() {
    let table = Table::new()
        .process(1, 0, &["/sbin/init"])
        .process(
            30,
            1,
            &[
                "/usr/bin/python3.11",
                "/usr/bin/patroni",
                "/etc/patroni.yml",
            ],
        )
        .process(40, 30, &["postgres", "-D", "/x"]);
    let found = table.found(&table.pgdata(40));
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(found[0].0, "patroni");
    assert!(found[0].1.contains("started by process 30"), "{found:?}");

    let table = Table::new()
        .process(1, 0, &["/usr/bin/supervisord"])
        .process(40, 1, &["postgres"]);
    assert_eq!(table.found(&table.pgdata(40))[0].0, "supervisor");
    let table = Table::new().process(1, 0, &["postgres"]);
    assert_eq!(table.found(&table.pgdata(1))[0].0, "container");
}

#[test]
fn a_manager_of_another_database_is_told_apart_where_that_can_be_seen() {
    let table = Table::new().process(40, 1, &["postgres"]);
    let pgdata = table.pgdata(40);
    let config = table.0.path().join("patroni.yml");
    let named = config.to_str().unwrap();
    let table = table.process(31, 1, &["python3", "/usr/bin/patroni", named]);

    fs::write(&config, "postgresql:\n  data_dir: /srv/other\n").unwrap();
    assert_eq!(table.found(&pgdata), []);
    // A directory beside ours whose name goes on is another one.
    fs::write(&config, format!("data_dir: {}2\n", pgdata.display())).unwrap();
    assert_eq!(table.found(&pgdata), []);
    fs::write(&config, format!("data_dir: '{}/'\n", pgdata.display())).unwrap();
    assert!(
        table.found(&pgdata)[0]
            .1
            .contains("names the data directory")
    );
    fs::remove_file(&config).unwrap();
    assert!(table.found(&pgdata)[0].1.contains("cannot be read"));
    fs::write(pgdata.join("patroni.dynamic.json"), "{}").unwrap();
    assert!(table.found(&pgdata)[0].1.contains("patroni.dynamic.json"));
}

#[test]
fn arguments_name_the_database() {
    let table = Table::new().process(40, 1, &["postgres"]);
    let pgdata = table.pgdata(40);
    let table = table.process(
        41,
        1,
        &["pg_autoctl", "run", "--pgdata", pgdata.to_str().unwrap()],
    );
    assert_eq!(table.found(&pgdata)[0].0, "pg_auto_failover");
    let table = table.process(42, 1, &["/opt/gauss/bin/cm_agent"]);
    assert_eq!(table.found(&pgdata).len(), 2);
}

#[test]
fn units_are_read_from_cgroups() {
    let unit = |text: &str| unit_of(text);
    let v2 = "0::/system.slice/system-postgresql.slice/postgresql@15-main.service\n";
    assert_eq!(unit(v2).as_deref(), Some("postgresql@15-main.service"));
    let v1 = "12:pids:/system.slice/postgresql-15.service\n1:name=systemd:/system.slice/postgresql-15.service\n";
    assert_eq!(unit(v1).as_deref(), Some("postgresql-15.service"));
    assert_eq!(unit("0::/user.slice/user-0.slice/user@0.service\n"), None);
    assert_eq!(unit("0::/user.slice/user-0.slice/session-3.scope\n"), None);
    assert_eq!(unit("0::/\n"), None);
}
