//! The proxies: those that the operator names, and those that these list.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use agent_sql::SqlError;
use agent_sql::proxy::{Clock, ComputeNode, ProxyConnection, ProxyOptions, StorageNode};
use futures_util::future::join_all;
use tokio::net::lookup_host;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::{ASK, CONNECT, Proxy, ProxyAccess, of_proxy};
use crate::failure::{Failure, Result};
use crate::printer::Printer;
use crate::settings::values::Address;

/// For a look at a proxy that was found before. One that takes longer is found anew.
const STILL: Duration = Duration::from_secs(3);
/// For looking a host name up.
const LOOK_UP: Duration = Duration::from_secs(3);

/// All proxies that are known, at least one of them reached.
#[derive(Debug)]
pub(crate) struct Reached {
    proxies: Vec<Proxy>,
    /// What the registry lists, by the instances' ids: proxies, and programs with ShardingSphere in them.
    listed: BTreeMap<String, ComputeNode>,
}

/// What the proxies that are reached say of all.
#[derive(Debug, Default)]
struct Listing {
    instances: BTreeMap<String, ComputeNode>,
    answers: usize,
    /// The first that does not say.
    failed: Option<Failure>,
}

/// A listed proxy, and where it should be reached.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Listed {
    /// Where it is reached from here.
    address: Address,
    version: Option<String>,
}

impl Reached {
    /// Connects to all.
    ///
    /// # Errors
    /// If none that the operator names can be reached, or one of these refuses user or password; if those that can be
    /// reached list nothing; a cancellation.
    pub(crate) async fn find(access: &ProxyAccess, cancel: &CancellationToken) -> Result<Self> {
        let configured = access.configured.iter();
        let connects = configured.map(|address| connect(address, access, cancel));
        let mut proxies = Vec::new();
        let mut why = None;
        for (address, (options, connection)) in
            access.configured.iter().zip(join_all(connects).await)
        {
            let (connection, error) = match connection {
                Ok(connection) => (Some(connection), None),
                // A mistake of the operator's, and no proxy that is gone.
                Err(
                    error @ (SqlError::WrongPassword { .. }
                    | SqlError::Refused { .. }
                    | SqlError::Cancelled { .. }),
                ) => return Err(of_proxy(address, &error)),
                Err(error) => (None, Some(error)),
            };
            proxies.push(Proxy {
                address: address.clone(),
                options,
                connection,
                unreachable: error.as_ref().map(ToString::to_string),
                configured: true,
                listed: false,
                version: None,
            });
            why = why.or(error.map(|error| of_proxy(address, &error)));
        }
        if proxies.iter().all(|proxy| proxy.connection.is_none()) {
            return Err(why.unwrap_or_else(|| Failure::usage("no proxy is given")));
        }
        let mut reached = Self {
            proxies,
            listed: BTreeMap::new(),
        };
        reached.take_in_listed(access, cancel).await?;
        Ok(reached)
    }

    /// Adds those that are listed and that the operator does not name.
    async fn take_in_listed(
        &mut self,
        access: &ProxyAccess,
        cancel: &CancellationToken,
    ) -> Result<()> {
        let listing = self.listing(ASK).await;
        if let Some(failure) = listing.failed.filter(|_| listing.answers == 0) {
            return Err(failure);
        }
        self.listed = listing.instances;
        let all = self.listed.values().filter(|it| it.port != 0).cloned();
        let all: Vec<_> = all.collect();
        let mut others = Vec::new();
        for listed in mapped(&all, access) {
            match self.place_of(&listed).await {
                Some(place) => {
                    let proxy = &mut self.proxies[place];
                    proxy.listed = true;
                    proxy.version = listed.version.or(proxy.version.take());
                }
                None if others.contains(&listed) => {}
                None => others.push(listed),
            }
        }
        let connects = others
            .iter()
            .map(|listed| connect(&listed.address, access, cancel));
        let connected = join_all(connects).await;
        for (listed, (options, connection)) in others.into_iter().zip(connected) {
            let (connection, unreachable) = match connection {
                Ok(connection) => (Some(connection), None),
                Err(error) => (None, Some(error.to_string())),
            };
            self.proxies.push(Proxy {
                address: listed.address,
                options,
                connection,
                unreachable,
                configured: false,
                listed: true,
                version: listed.version,
            });
        }
        Ok(())
    }

    /// Asks all that are reached.
    async fn listing(&self, limit: Duration) -> Listing {
        let asked = self.connected().map(|(proxy, connection)| async move {
            let listed = connection.compute_nodes(limit).await;
            listed.map_err(|error| of_proxy(&proxy.address, &error))
        });
        let mut listing = Listing::default();
        for answer in join_all(asked).await {
            match answer {
                Ok(instances) => {
                    listing.answers += 1;
                    let instances = instances.into_iter();
                    let by_id = instances.map(|it| (it.instance_id.clone(), it));
                    listing.instances.extend(by_id);
                }
                Err(failure) => listing.failed = listing.failed.or(Some(failure)),
            }
        }
        listing
    }

    /// Whether what was found holds still, by one question to each proxy: all of them are reached, answer in the session that is
    /// there, and list what was listed. Otherwise they have to be found anew: one that nobody knows lets writes pass.
    pub(super) async fn holds(&self) -> bool {
        if self.proxies.iter().any(|proxy| proxy.connection.is_none()) {
            return false;
        }
        let listing = self.listing(STILL).await;
        listing.failed.is_none() && listing.instances == self.listed
    }

    /// The proxy that the operator names and that is listed so.
    async fn place_of(&self, listed: &Listed) -> Option<usize> {
        let text = |proxy: &Proxy| proxy.address == listed.address;
        if let Some(place) = self.proxies.iter().position(text) {
            return Some(place);
        }
        let theirs = addresses(&listed.address).await;
        for (place, proxy) in self.proxies.iter().enumerate() {
            if proxy.address.port == listed.address.port
                && is_same(&addresses(&proxy.address).await, &theirs)
            {
                return Some(place);
            }
        }
        None
    }

    /// Names what cannot be reached, or is odd.
    pub(super) fn tell(&self, printer: &Printer) {
        for (proxy, message) in self.oddities() {
            printer.warning(proxy.as_deref(), &message);
        }
    }

    /// What cannot be reached or is odd: the proxy, if it is one, and words.
    pub(crate) fn oddities(&self) -> Vec<(Option<String>, String)> {
        let mut all = Vec::new();
        for proxy in &self.proxies {
            let name = || Some(proxy.address.to_string());
            match &proxy.unreachable {
                Some(why) if proxy.configured => all.push((name(), format!(
                    "this proxy is not reached ({why}): whether it is gone or writes on is not known"
                ))),
                Some(why) => all.push((name(), format!(
                    "the cluster lists a proxy here that is not reached ({why}): a proxy that has just gone is listed for some 40 s; if it is reached elsewhere, say so: `--proxy-map {}=HOST:PORT`",
                    proxy.address
                ))),
                None if !proxy.listed => all.push((name(), format!(
                    "this proxy answers, and the cluster does not list it: it may be cut off from the registry, and then writes on whatever is locked; or it is listed by another address, say so: `--proxy-map LISTED={}`",
                    proxy.address
                ))),
                None => {}
            }
        }
        let embedded = self.listed.values().filter(|it| it.port == 0).count();
        if embedded > 0 {
            let message = format!(
                "{embedded} programs have ShardingSphere-JDBC in them: no lock stops what they write; what a point proves holds for them too"
            );
            all.push((None, message));
        }
        all
    }

    /// All of them.
    pub(crate) fn proxies(&self) -> &[Proxy] {
        &self.proxies
    }

    pub(super) fn into_proxies(self) -> Vec<Proxy> {
        self.proxies
    }

    /// Those that are reached.
    pub(crate) fn connected(&self) -> impl Iterator<Item = (&Proxy, &ProxyConnection)> {
        let all = self.proxies.iter();
        all.filter_map(|proxy| Some((proxy, proxy.connection.as_ref()?)))
    }

    /// The host of the proxy that is asked for what all of them know.
    pub(super) fn host(&self) -> &str {
        let first = self.connected().next();
        first.map_or("", |(proxy, _)| proxy.address.host.as_str())
    }

    /// All data nodes, of every logical database.
    ///
    /// # Errors
    /// If no proxy says.
    pub(crate) async fn storage_nodes(&self) -> Result<Vec<StorageNode>> {
        self.told(async |proxy| proxy.export_storage_nodes(ASK).await)
            .await
    }

    /// What gives commits their numbers.
    ///
    /// # Errors
    /// If no proxy says.
    pub(crate) async fn clock(&self) -> Result<Clock> {
        self.told(async |proxy| proxy.clock(ASK).await).await
    }

    /// What all proxies know, from the first that tells it: any of them may have gone since it was reached.
    ///
    /// # Errors
    /// If none does: the first one's.
    pub(crate) async fn told<T>(
        &self,
        ask: impl AsyncFn(&ProxyConnection) -> std::result::Result<T, SqlError>,
    ) -> Result<T> {
        let mut why = None;
        for (proxy, connection) in self.connected() {
            match ask(connection).await {
                Ok(told) => return Ok(told),
                Err(error) => why = why.or(Some(of_proxy(&proxy.address, &error))),
            }
        }
        Err(why.unwrap_or_else(|| Failure::usage("no proxy is reached")))
    }
}

/// What is listed, with where it is reached.
fn mapped(all: &[ComputeNode], access: &ProxyAccess) -> Vec<Listed> {
    let listed = all.iter().map(|instance| {
        let listed = Address {
            host: instance.host.clone(),
            port: instance.port,
        };
        let by_port = access.map.iter();
        let by_port = by_port.filter(|named| named.names(&listed) == Some(true));
        let by_host = access.map.iter();
        let by_host = by_host.filter(|named| named.names(&listed) == Some(false));
        let told = by_port.chain(by_host).next();
        Listed {
            address: told.map_or(listed, |named| named.address.clone()),
            version: Some(instance.version.clone()).filter(|version| !version.is_empty()),
        }
    });
    listed.collect()
}

async fn connect(
    address: &Address,
    access: &ProxyAccess,
    cancel: &CancellationToken,
) -> (ProxyOptions, std::result::Result<ProxyConnection, SqlError>) {
    let options = ProxyOptions {
        host: address.host.clone(),
        port: address.port,
        user: access.user.clone(),
        password: access.password.as_ref().map(super::password_of),
        connect_timeout: CONNECT,
        tls: access.tls.clone(),
        ..ProxyOptions::default()
    };
    let connection = ProxyConnection::connect(&options, cancel.clone()).await;
    (options, connection)
}

/// What a host's name stands for; nothing, if that is not known.
async fn addresses(address: &Address) -> BTreeSet<IpAddr> {
    let look_up = lookup_host((address.host.as_str(), address.port));
    match timeout(LOOK_UP, look_up).await {
        Ok(Ok(found)) => found.map(|found| found.ip().to_canonical()).collect(),
        _ => BTreeSet::new(),
    }
}

/// Whether two hosts are one: they share an address, or the one is this host by its loopback, and the other an address of
/// this host's.
fn is_same(ours: &BTreeSet<IpAddr>, theirs: &BTreeSet<IpAddr>) -> bool {
    if !ours.is_disjoint(theirs) {
        return true;
    }
    let here = |all: &BTreeSet<IpAddr>| all.iter().any(IpAddr::is_loopback);
    (here(ours) && theirs.iter().any(is_local)) || (here(theirs) && ours.iter().any(is_local))
}

/// Whether an address is one of this host's: only of these can a socket be bound.
fn is_local(address: &IpAddr) -> bool {
    UdpSocket::bind(SocketAddr::new(*address, 0)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use agent_sql::proxy::ProxyTls;

    fn instance(id: &str, host: &str, port: u16) -> ComputeNode {
        ComputeNode {
            instance_id: id.into(),
            kind: "PROXY".into(),
            host: host.into(),
            port,
            status: "OK".into(),
            mode: "Cluster".into(),
            version: "5.5.2".into(),
        }
    }

    #[test]
    fn listed_addresses_are_mapped_by_port_before_host() {
        let map = ["10.0.0.5=127.0.0.1:1", "10.0.0.5:3308=127.0.0.1:2"];
        let access = ProxyAccess {
            configured: Vec::new(),
            map: map.map(|text| text.parse().unwrap()).to_vec(),
            user: "root".into(),
            password: None,
            tls: ProxyTls::Off,
            agent_port: 18080,
            agents: Vec::new(),
        };
        let all = [
            instance("a", "10.0.0.5", 3307),
            instance("b", "10.0.0.5", 3308),
            instance("c", "10.0.0.6", 3307),
        ];
        let reached: Vec<_> = mapped(&all, &access)
            .into_iter()
            .map(|it| it.address.to_string())
            .collect();
        assert_eq!(reached, ["127.0.0.1:1", "127.0.0.1:2", "10.0.0.6:3307"]);
    }

    #[test]
    fn a_loopback_is_the_same_host_as_its_other_addresses() {
        let set = |text: &str| BTreeSet::from([text.parse::<IpAddr>().unwrap()]);
        assert!(is_same(&set("127.0.0.1"), &set("127.0.0.1")));
        assert!(is_same(&set("127.0.0.1"), &set("127.0.0.2")));
        // TEST-NET-1 is nobody's.
        assert!(!is_same(&set("127.0.0.1"), &set("192.0.2.7")));
        assert!(!is_same(&set("192.0.2.7"), &set("192.0.2.8")));
        assert!(!is_same(&BTreeSet::new(), &BTreeSet::new()));
    }
}
