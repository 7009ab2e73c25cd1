//! Which data nodes are taken, left out and refused.

use agent_api::ServerFacts;

use super::*;
use crate::cluster::nodes::Login;
use crate::settings::values::Address;

const ID: u64 = 7_000_000_000_000_000_001;

fn at(text: &str) -> Address {
    text.parse().unwrap()
}

fn wanted(listed: &str) -> Wanted {
    let listed = at(listed);
    Wanted {
        address: listed.clone(),
        agent: Address {
            port: 18080,
            ..listed.clone()
        },
        listed,
        databases: BTreeSet::from(["bank".to_owned()]),
        told: false,
        login: Login {
            user: "u".into(),
            password: None,
            database: "d".into(),
        },
    }
}

fn facts(port: u16, directory: &str) -> NodeFacts {
    serde_json::from_value(serde_json::json!({
        "host": "h", "machine_id": "m", "os_user": "u", "allow_roots": [], "pgdata": directory, "pg_port": port,
        "installed": {}, "has_credentials": true, "server_error": null,
        "server": {
            "system_identifier": ID, "server_version_num": 150_000, "data_directory": directory, "port": port,
            "wal_segment_size": 16_777_216, "timeline": 1, "in_recovery": false, "data_checksums": true,
            "size_bytes": 0, "tablespaces": [],
        },
    }))
    .unwrap()
}

fn server(facts: &mut NodeFacts) -> &mut ServerFacts {
    facts.server.as_mut().unwrap()
}

fn heard(listed: &str, agent: Result<NodeFacts>, identity: Option<(u64, bool)>) -> Heard {
    Heard {
        node: wanted(listed),
        agent,
        identity: identity.map(|(system_identifier, in_recovery)| Identity {
            system_identifier,
            in_recovery,
        }),
    }
}

fn silent() -> Result<NodeFacts> {
    Err(Failure::new(ErrorKind::AgentUnreachable, "nobody there"))
}

#[test]
fn primaries_are_taken_and_replicas_left_out() {
    let mut replica = facts(5433, "/r");
    server(&mut replica).in_recovery = true;
    let all = vec![
        heard("db1:5432", Ok(facts(5432, "/a")), Some((ID, false))),
        heard("db1:5433", Ok(replica), None),
        // A replica that has no agent says itself what it is.
        heard("db2:5432", silent(), Some((ID, true))),
    ];
    let found = sorted(all, Purpose::Backup).unwrap();
    let nodes: Vec<_> = found.nodes.iter().map(|it| it.listed.to_string()).collect();
    let replicas = found.replicas.iter();
    let replicas: Vec<_> = replicas.map(|it| it.listed.to_string()).collect();
    assert_eq!(nodes, ["db1:5432"]);
    assert_eq!(replicas, ["db1:5433", "db2:5432"]);
}

#[test]
fn every_primary_without_an_agent_is_named() {
    let all = vec![
        heard("db1:5432", silent(), Some((ID, false))),
        heard("db2:5432", Ok(facts(5432, "/a")), None),
        heard("db3:5432", silent(), None),
    ];
    let failure = sorted(all, Purpose::Backup).unwrap_err();
    assert_eq!(failure.kind, ErrorKind::AgentUnreachable);
    assert_eq!(failure.node.as_deref(), Some("db1:5432"));
    assert!(failure.message.contains("db1:5432") && failure.message.contains("db3:5432"));
    assert!(!failure.message.contains("db2:5432"), "{failure:?}");
    let next = failure.next.unwrap();
    assert!(next.contains("--agents db1:5432=HOST:PORT"), "{next}");
}

#[test]
fn an_agent_of_another_database_is_refused() {
    let other_port = heard("db1:5433", Ok(facts(5432, "/a")), None);
    let failure = sorted(vec![other_port], Purpose::Backup).unwrap_err();
    assert_eq!(failure.kind, ErrorKind::Conflict);
    assert!(failure.message.contains("port 5432"), "{failure:?}");

    let other = heard("db1:5432", Ok(facts(5432, "/a")), Some((ID + 1, false)));
    let failure = sorted(vec![other], Purpose::Backup).unwrap_err();
    assert!(failure.message.contains("system identifier"), "{failure:?}");

    // Behind a forwarded port: the operator says so, and the identifier agrees.
    let mut forwarded = heard("db1:6432", Ok(facts(5432, "/a")), Some((ID, false)));
    assert!(verdict(&forwarded, Purpose::Backup).is_err());
    forwarded.node.told = true;
    let verdict_of = verdict(&forwarded, Purpose::Backup).unwrap();
    assert_eq!(verdict_of, Verdict::Primary);
    forwarded.identity = None;
    assert!(verdict(&forwarded, Purpose::Backup).is_err());
}

#[test]
fn a_database_may_be_down_only_for_a_restore() {
    let down = || {
        let mut facts = facts(5432, "/a");
        facts.server = None;
        facts
    };
    let taken = verdict(&heard("db1:5432", Ok(down()), None), Purpose::Restore);
    assert_eq!(taken.unwrap(), Verdict::Primary);
    let failure = verdict(&heard("db1:5432", Ok(down()), None), Purpose::Backup).unwrap_err();
    assert_eq!(failure.kind, ErrorKind::Database);
    assert!(verdict(&heard("db1:5433", Ok(down()), None), Purpose::Restore).is_err());
}

#[test]
fn one_database_by_two_names_is_one_node() {
    let mut second = heard("10.0.0.1:5432", Ok(facts(5432, "/a")), None);
    second.node.databases = BTreeSet::from(["shop".to_owned()]);
    let all = vec![heard("db1:5432", Ok(facts(5432, "/a")), None), second];
    let found = sorted(all, Purpose::Backup).unwrap();
    assert_eq!(found.nodes.len(), 1);
    assert_eq!(found.nodes[0].databases, ["bank", "shop"]);
}

#[test]
fn a_cluster_of_replicas_has_nothing_to_back_up() {
    let all = vec![heard("db1:5432", silent(), Some((ID, true)))];
    let failure = sorted(all, Purpose::Backup).unwrap_err();
    assert_eq!(failure.kind, ErrorKind::Database);
}
