//! Data nodes, as the proxies export them: which there are, and where each one's agent should be.

use std::collections::{BTreeMap, BTreeSet};

use agent_api::ErrorKind;
use agent_sql::Password;
use agent_sql::proxy::StorageNode;

use super::ProxyAccess;
use crate::failure::{Failure, Result};
use crate::settings::values::{Address, Named};

/// A data node whose agent is to be asked.
#[derive(Debug, Clone)]
pub(super) struct Wanted {
    /// Where it is, as the proxies have it.
    pub(super) listed: Address,
    /// Where it is from here: a loopback address is one of the proxy's host.
    pub(super) address: Address,
    /// Logical databases with a storage unit there.
    pub(super) databases: BTreeSet<String>,
    /// Where its agent should be.
    pub(super) agent: Address,
    /// Whether the operator said so.
    pub(super) told: bool,
    /// How the proxies log in to it: to ask it what it is.
    pub(super) login: Login,
}

/// How the proxies log in to a data node.
#[derive(Debug, Clone)]
pub(super) struct Login {
    pub(super) user: String,
    pub(super) password: Option<Password>,
    pub(super) database: String,
}

/// Whether a host is the one that says so, and no other.
pub(super) fn is_loopback(host: &str) -> bool {
    host.eq_ignore_ascii_case("localhost")
        || host
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

/// Where all data nodes are, as the proxies have them.
pub(crate) fn places(units: &[StorageNode]) -> BTreeSet<Address> {
    units.iter().map(listed).collect()
}

fn listed(unit: &StorageNode) -> Address {
    Address {
        host: unit.host.clone(),
        port: unit.port,
    }
}

/// All data nodes, each once, in the order of their addresses. `proxy_host` is the host of the proxy that exported them,
/// as it is reached from here.
///
/// # Errors
/// If there are none; if `--agents` names one that there is not, or several.
pub(super) fn of_units(
    units: &[StorageNode],
    proxy_host: &str,
    access: &ProxyAccess,
) -> Result<Vec<Wanted>> {
    let mut all: BTreeMap<Address, Wanted> = BTreeMap::new();
    for unit in units {
        let listed = listed(unit);
        let node = all.entry(listed.clone()).or_insert_with(|| {
            // What the proxy calls its own host is not ours, unless it is on ours.
            let host = if is_loopback(&unit.host) {
                proxy_host.to_owned()
            } else {
                unit.host.clone()
            };
            let port = access.agent_port;
            Wanted {
                agent: Address {
                    host: host.clone(),
                    port,
                },
                address: Address {
                    host,
                    port: unit.port,
                },
                listed,
                databases: BTreeSet::new(),
                told: false,
                login: Login {
                    user: unit.user.clone(),
                    password: unit.password.clone(),
                    database: unit.database.clone(),
                },
            }
        });
        node.databases.insert(unit.logical_database.clone());
    }
    let mut all: Vec<Wanted> = all.into_values().collect();
    if all.is_empty() {
        let message = "the proxies have no storage units: there is no data node to back up";
        return Err(Failure::new(ErrorKind::NotFound, message)
            .next("SHOW STORAGE UNITS in each logical database; is it the right cluster?"));
    }
    for named in &access.agents {
        tell(&mut all, named)?;
    }
    shared_agents(&all)?;
    Ok(all)
}

/// Takes in what `--agents` says.
fn tell(all: &mut [Wanted], named: &Named) -> Result<()> {
    let how = |node: &Wanted| {
        let listed = named.names(&node.listed);
        listed.or_else(|| named.names(&node.address))
    };
    let whole: Vec<usize> = (0..all.len())
        .filter(|place| how(&all[*place]) == Some(true))
        .collect();
    let hosts: Vec<usize> = (0..all.len())
        .filter(|place| how(&all[*place]) == Some(false))
        .collect();
    let places = if whole.is_empty() { hosts } else { whole };
    match places.as_slice() {
        [place] => {
            let node = &mut all[*place];
            if node.told && node.agent != named.address {
                let message = format!("`--agents` names data node {} twice", node.listed);
                return Err(Failure::usage(message));
            }
            node.agent = named.address.clone();
            node.told = true;
            Ok(())
        }
        [] => {
            let message = format!(
                "`--agents` names data node `{}`, and the proxies have {}",
                named.name,
                names_of(all.iter())
            );
            Err(Failure::usage(message))
        }
        several => {
            let several = several.iter().map(|place| &all[*place]);
            let message = format!(
                "`--agents`: `{}` is more than one data node: {}",
                named.name,
                names_of(several)
            );
            Err(Failure::usage(message).next("name each with its port"))
        }
    }
}

/// Several nodes on one host cannot have the agent on one port.
fn shared_agents(all: &[Wanted]) -> Result<()> {
    for (place, node) in all.iter().enumerate() {
        let same = all[..place].iter().find(|other| {
            let one_host = other.address.host == node.address.host;
            other.agent == node.agent && one_host && other.address.port != node.address.port
        });
        if let Some(other) = same {
            let (agent, one, two) = (&node.agent, &other.listed, &node.listed);
            let message = format!(
                "data nodes {one} and {two} are on one host, and both would have the agent at {agent}; each database has an agent of its own"
            );
            return Err(Failure::usage(message).next(format!(
                "say where they are: `--agents {one}=HOST:PORT,{two}=HOST:PORT`"
            )));
        }
    }
    Ok(())
}

fn names_of<'a>(all: impl Iterator<Item = &'a Wanted>) -> String {
    let names: Vec<_> = all.map(|node| node.listed.to_string()).collect();
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use agent_sql::proxy::ProxyTls;

    use super::*;

    fn unit(database: &str, host: &str, port: u16) -> StorageNode {
        StorageNode {
            logical_database: database.into(),
            host: host.into(),
            port,
            user: "u".into(),
            password: None,
            database: "d".into(),
            remark: String::new(),
        }
    }

    fn access(agents: &[&str]) -> ProxyAccess {
        ProxyAccess {
            configured: Vec::new(),
            map: Vec::new(),
            user: "root".into(),
            password: None,
            tls: ProxyTls::Off,
            agent_port: 18080,
            agents: agents.iter().map(|text| text.parse().unwrap()).collect(),
        }
    }

    #[test]
    fn each_node_is_there_once_whatever_databases_it_has() {
        let units = [
            unit("shop", "db2", 5432),
            unit("bank", "db1", 5432),
            unit("shop", "db1", 5432),
        ];
        let all = of_units(&units, "proxy1", &access(&[])).unwrap();
        let shown = all.iter().map(|node| {
            (
                node.listed.to_string(),
                node.agent.to_string(),
                node.databases.len(),
            )
        });
        assert_eq!(
            shown.collect::<Vec<_>>(),
            [
                ("db1:5432".to_owned(), "db1:18080".to_owned(), 2),
                ("db2:5432".to_owned(), "db2:18080".to_owned(), 1),
            ]
        );
    }

    #[test]
    fn loopback_is_the_proxys_host() {
        for host in ["127.0.0.1", "localhost", "::1"] {
            let all = of_units(&[unit("bank", host, 5432)], "proxy1", &access(&[])).unwrap();
            assert_eq!(all[0].agent.to_string(), "proxy1:18080");
            assert_eq!(all[0].address.to_string(), "proxy1:5432");
            assert_eq!(all[0].listed.host, host);
        }
    }

    #[test]
    fn several_nodes_on_one_host_need_their_agents_named() {
        let units = [unit("bank", "db1", 5432), unit("bank", "db1", 5433)];
        let failure = of_units(&units, "p", &access(&[])).unwrap_err();
        assert_eq!(failure.kind, ErrorKind::Usage);
        assert!(
            failure
                .next
                .unwrap()
                .contains("--agents db1:5432=HOST:PORT,db1:5433=HOST:PORT")
        );
        let all = of_units(&units, "p", &access(&["db1:5433=db1:18081"])).unwrap();
        assert_eq!(all[0].agent.to_string(), "db1:18080");
        assert_eq!(all[1].agent.to_string(), "db1:18081");
        assert!(all[1].told && !all[0].told);
    }

    #[test]
    fn agents_of_nodes_that_are_none_are_refused() {
        let units = [unit("bank", "db1", 5432), unit("bank", "db2", 5433)];
        let refused = |agents: &[&str]| of_units(&units, "p", &access(agents)).unwrap_err().message;
        assert!(refused(&["db3=db3:1"]).contains("db1:5432, db2:5433"));
        assert!(refused(&["db1=a:1", "db1:5432=b:1"]).contains("twice"));
        let by_host = of_units(&units, "p", &access(&["db2=a:1"])).unwrap();
        assert_eq!(by_host[1].agent.to_string(), "a:1");
        let same = [unit("bank", "db1", 5432), unit("bank", "db1", 5433)];
        let failure = of_units(&same, "p", &access(&["db1=a:1"])).unwrap_err();
        assert!(failure.message.contains("more than one"), "{failure:?}");
    }

    #[test]
    fn no_storage_units_are_no_cluster() {
        assert_eq!(
            of_units(&[], "p", &access(&[])).unwrap_err().kind,
            ErrorKind::NotFound
        );
    }
}
