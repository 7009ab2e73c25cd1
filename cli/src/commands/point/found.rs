//! The nodes that points are made of: agents of `--nodes`, or of the data nodes that the proxies list.

use std::collections::BTreeSet;

use tokio_util::sync::CancellationToken;

use crate::agents::{self, Host};
use crate::cluster::{Cluster, ProxyAccess, Purpose};
use crate::commands::backup::nodes;
use crate::failure::Result;
use crate::printer::Printer;
use crate::settings::Settings;
use crate::settings::values::Address;

/// What was found. It holds for many points, until one fails.
#[derive(Debug)]
pub(super) struct Found {
    /// The agents, and what they said.
    pub(super) hosts: Vec<Host>,
    /// All data nodes, as the proxies list them; none without proxies.
    pub(super) listed: BTreeSet<Address>,
}

impl Found {
    /// Asks proxies and agents.
    ///
    /// # Errors
    /// What cannot be reached, or is not fit for a point; a cancellation.
    pub(super) async fn find(
        access: Option<&ProxyAccess>,
        settings: &Settings,
        printer: &Printer,
        cancel: &CancellationToken,
    ) -> Result<Self> {
        let (addresses, listed) = match access {
            None => (settings.nodes()?.to_vec(), BTreeSet::new()),
            Some(access) => {
                let cluster =
                    Cluster::discover(access, Purpose::Backup, settings, printer, cancel).await?;
                (cluster.agents(), cluster.listed)
            }
        };
        let hosts = agents::connect(&addresses, settings, printer, cancel).await?;
        nodes::check_hosts(&hosts)?;
        Ok(Self { hosts, listed })
    }
}
