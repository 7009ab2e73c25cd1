//! Before anything is begun: whether somebody has locked the cluster.

use std::time::Duration;

use agent_api::ErrorKind;
use agent_sql::proxy::Gate;
use catalog::Catalog;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{FOREIGN, known};
use crate::agents::pause;
use crate::cluster::Proxy;
use crate::failure::{Failure, Result};

/// How long a proxy may take to say.
const PROBE: Duration = Duration::from_secs(5);
/// Another's lock is a matter of milliseconds.
const AGAIN: Duration = Duration::from_millis(250);

/// Refuses to begin while the cluster is locked. A lock that is gone within seconds is another's point.
///
/// # Errors
/// A conflict that says what is known of who has locked; a cancellation.
pub(crate) async fn refuse(
    proxies: &[Proxy],
    catalog: &Catalog,
    operation: Uuid,
    cancel: &CancellationToken,
) -> Result<()> {
    let until = Instant::now() + FOREIGN;
    loop {
        let Some((proxy, said)) = locked(proxies).await else {
            return Ok(());
        };
        if Instant::now() >= until {
            let known = known::holders(catalog, Some(operation)).await;
            let message =
                format!("the cluster is locked ({said}), and not by this command; {known}");
            return Err(Failure::new(ErrorKind::Conflict, message)
                .on(proxy)
                .next("wait until it is released; if nobody holds it any more: gs_pitr unlock"));
        }
        pause(AGAIN, cancel).await?;
    }
}

/// A proxy that refuses writes, with its words. What cannot be asked now is asked again before the lock.
async fn locked(proxies: &[Proxy]) -> Option<(String, String)> {
    for proxy in proxies {
        if let Some(connection) = &proxy.connection
            && let Ok(Gate::Locked(said)) = connection.probe(PROBE).await
        {
            return Some((proxy.address.to_string(), said));
        }
    }
    None
}
