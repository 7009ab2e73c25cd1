//! Commands of the program that only read, on a chain in a store.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use agent_api::ApiError;
use pipeline::budget::Budget;
use pitr_agent::catalog_fs::CatalogFs;
use pitr_agent::catalog_fs::life::{MountHow, MountSettings, Mounted};
use pitr_agent::catalog_fs::stored::Stored;
use tokio::time::timeout;

use crate::catalog_in_a_directory::Catalog;
use crate::{Tools, downloader};

/// For one command of the program.
const PATIENCE: Duration = Duration::from_mins(2);

/// What the program says of the stored chain, which it finds in a mount: `show`, and `validate` of each copy, as exit code and words.
/// And what the store said meanwhile.
pub(crate) async fn asked_in_a_mount(
    tools: &Tools,
    catalog: &Catalog<'_>,
    runtime_dir: &Path,
) -> (Vec<(Option<i32>, String)>, Option<ApiError>) {
    let (downloader, _) = downloader(catalog, 64 << 20);
    let store = Arc::clone(&catalog.source.store);
    let repository = catalog::Catalog::open(store).await.unwrap();
    let stored = Stored::load(&downloader, &repository, &catalog.chain, 4, None).await;
    let stored = stored.unwrap();
    let overlay = Budget::new(64 << 20);
    let fs = CatalogFs::for_reading(stored.entries.clone(), stored.lower(), &overlay).unwrap();
    let settings = MountSettings {
        runtime_dir: runtime_dir.to_owned(),
        runner: tools.agent.clone(),
        ..MountSettings::new(MountHow::Auto)
    };
    let mounted = Mounted::start(fs, &settings, "asked").await.unwrap();
    let mut asked = vec![vec!["show", "--format=json"]];
    for link in &catalog.chain {
        let id = link.node.probackup.as_ref().unwrap().id.as_str();
        asked.push(vec!["validate", "-j", "2", "-i", id]);
    }
    let mut said = Vec::new();
    for arguments in asked {
        let mut command = mounted.command(&tools.probackup);
        command.args(arguments).args(["--instance", "node", "-B"]);
        let output = command.arg(mounted.path()).output();
        let output = timeout(PATIENCE, output).await;
        let output = output.expect("it ends").unwrap();
        let words = [output.stdout, output.stderr].concat();
        let words = String::from_utf8_lossy(&words).into_owned();
        said.push((output.status.code(), words));
    }
    mounted.unmount().await.unwrap();
    (said, stored.lower.trouble())
}
