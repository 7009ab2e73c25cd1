//! Restores by the real code: what comes back, or why nothing does.

use std::path::PathBuf;
use std::sync::Arc;

use catalog::ids::BackupId;
use catalog::wal::{self, WalName};
use catalog::{Catalog, keys};
use pipeline::extract::{ExtractOptions, extract};
use pipeline::index::Index;
use pipeline::pack::IndexEntry;
use pipeline::store::ObjectStore;

use super::fixture::{SEGMENT, World, downloader, read_tree};

/// All that a restore of one backup rests on: manifest, files, WAL. As one text and lists of bytes that can be compared.
#[derive(Debug, PartialEq)]
pub(crate) struct Restored {
    manifest: String,
    point: String,
    files: Vec<super::fixture::Files>,
    wal: Vec<(String, bytes::Bytes)>,
}

/// Memory, if the system has some as a file system: nothing here is about disks.
fn scratch() -> tempfile::TempDir {
    let memory = PathBuf::from("/dev/shm");
    tempfile::tempdir_in(&memory).unwrap_or_else(|_| tempfile::tempdir().unwrap())
}

/// # Errors
/// Why it cannot be restored.
pub(crate) async fn restore(world: &World, id: &BackupId) -> Result<Restored, String> {
    let store = Arc::clone(&world.store) as Arc<dyn ObjectStore>;
    let words = |error: catalog::CatalogError| error.to_string();
    let catalog = Catalog::open(Arc::clone(&store)).await.map_err(words)?;
    let found = catalog.restorable(id).await.map_err(words)?;
    catalog.check_logged(&found).await.map_err(words)?;
    let (mut files, mut wal) = (Vec::new(), Vec::new());
    for copy in &found.manifest.nodes {
        let downloader = downloader(&store);
        let key = keys::index(id, copy.node_id, copy.attempt);
        let index = Index::open_with(downloader.clone(), key, &copy.index);
        let index = index.map_err(|error| error.to_string())?;
        let packs = copy.packs.iter().map(|info| {
            let key = keys::pack(id, copy.node_id, copy.attempt, info.number);
            (key, info.clone())
        });
        let (packs, target) = (packs.collect::<Vec<_>>(), scratch());
        let map = |entry: &IndexEntry| Ok(Some(target.path().join(&entry.path)));
        let extracted = extract(&downloader, &index, &packs, ExtractOptions::default(), map).await;
        extracted.map_err(|error| error.to_string())?;
        files.push(read_tree(target.path()));
        let chain = catalog
            .epoch_chain(copy.node_id, &copy.epoch)
            .await
            .map_err(words)?;
        let point = found
            .point
            .nodes
            .iter()
            .find(|node| node.node_id == copy.node_id)
            .unwrap();
        let number = |name: &str| name.parse::<WalName>().unwrap().number(SEGMENT).unwrap();
        for number in number(&copy.wal_first)..=number(&point.wal_last) {
            let mut here = None;
            for timeline in (1..=point.timeline).rev() {
                let name = WalName::segment(timeline, number, SEGMENT).unwrap();
                here = wal::find_wal(&*store, &chain, &name).await.map_err(words)?;
                if here.is_some() {
                    break;
                }
            }
            let file = here.ok_or("a segment is missing")?;
            let limit = usize::try_from(SEGMENT).unwrap();
            let plain = wal::read_segment(&*store, &file, limit)
                .await
                .map_err(words)?;
            wal.push((file.to_string(), plain));
        }
    }
    Ok(Restored {
        manifest: serde_json::to_string(&found.manifest).unwrap(),
        point: serde_json::to_string(&found.point).unwrap(),
        files,
        wal,
    })
}

/// The control: what is restored is what was backed up.
pub(crate) async fn assert_original(world: &World) {
    for id in &world.backups {
        let restored = restore(world, id).await.unwrap();
        let wanted: Vec<_> = world
            .files
            .iter()
            .filter(|((backup, _), _)| backup == id)
            .collect();
        assert_eq!(restored.files.len(), 2);
        for (_, files) in wanted {
            assert!(restored.files.contains(files));
        }
        assert!(restored.wal.len() >= 5);
        for (name, plain) in &restored.wal {
            let original = world.wal.iter().find(|(file, _)| file.to_string() == *name);
            assert_eq!(original.unwrap().1, plain);
        }
    }
}
