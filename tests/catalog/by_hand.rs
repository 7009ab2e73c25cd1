//! docs/FORMAT.md is enough to read a file back: its own shell lines do it.

use std::process::Command;
use std::sync::Arc;

use catalog::keys;
use pipeline::index::{FilePacker, IndexBuilder};
use pipeline::pack::{EntryKind, Extent, IndexEntry, PackInfo, PackOptions, PackSet};
use pipeline::store::{Key, ObjectStore};
use support::memory_store::MemoryStore;

use super::samples::{OPERATION, backup_id};
use super::wal::{noise, uploader};

/// The block of docs/FORMAT.md that is marked as the one to run.
fn documented_lines() -> &'static str {
    let text = include_str!("../../docs/FORMAT.md");
    let (_, rest) = text.split_once("```sh by-hand\n").unwrap();
    rest.split_once("```").unwrap().0
}

#[tokio::test]
async fn the_documented_shell_lines_restore_a_file() {
    let memory = Arc::new(MemoryStore::default());
    let store = Arc::clone(&memory) as Arc<dyn ObjectStore>;
    let uploader = uploader(&store, OPERATION).await;
    let key_of = |number| keys::pack(&backup_id('b'), OPERATION, 1, number);
    let options = PackOptions {
        lanes: 1,
        ..PackOptions::default()
    };
    let (set, lanes) = PackSet::new(&uploader, Arc::new(key_of), options).unwrap();
    let index = Arc::new(IndexBuilder::new());
    // One of several frames, and small ones that share a frame.
    let files = [
        ("base/5/16384", noise((3 << 20) + 300_000)),
        ("PG_VERSION", b"15\n".as_slice().into()),
        ("base/5/1259", noise(114_688)),
    ];
    let mut packer = FilePacker::new(lanes.into_iter().next().unwrap(), Arc::clone(&index));
    let (builder, to_pack) = (Arc::clone(&index), files.clone());
    let thread = std::thread::spawn(move || {
        for (path, plain) in &to_pack {
            let file = builder.file(path, 0o600, None).unwrap();
            packer.chunk(file, 0, plain).unwrap();
            builder.close_file(file, plain.len() as u64);
        }
        packer.finish().unwrap();
    });
    tokio::task::spawn_blocking(move || thread.join().unwrap())
        .await
        .unwrap();
    let packs = set.finish().await.unwrap();
    let index_key = keys::index(&backup_id('b'), OPERATION, 1);
    index.write(&uploader, index_key.clone()).await.unwrap();

    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, key: &Key| {
        std::fs::write(
            directory.path().join(name),
            memory.bytes(key.as_str()).unwrap(),
        )
        .unwrap();
    };
    write("pack-00000", &key_of(0));
    write("index", &index_key);
    for (path, plain) in &files {
        let mut whole = Vec::new();
        for extent in extents(directory.path(), path) {
            whole.extend(by_hand(directory.path(), &packs[0], &extent));
        }
        assert!(whole == *plain, "{path}");
    }
}

fn extents(directory: &std::path::Path, path: &str) -> Vec<Extent> {
    let output = Command::new("zstd")
        .args(["-dcq", "index"])
        .current_dir(directory)
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let lines = text
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok());
    let mut entries = lines.filter(|entry: &IndexEntry| entry.path == path);
    match entries.next().unwrap().kind {
        EntryKind::File { extents, .. } => extents,
        other => panic!("{other:?}"),
    }
}

/// Runs the documented lines for one extent.
fn by_hand(directory: &std::path::Path, pack: &PackInfo, extent: &Extent) -> Vec<u8> {
    let output = Command::new("sh")
        .args(["-eu", "-c", documented_lines()])
        .current_dir(directory)
        .env("PACK", "pack-00000")
        .env("T", pack.table_offset.to_string())
        .env("F", extent.first.to_string())
        .env("N", extent.count.to_string())
        .env("O", extent.offset.to_string())
        .env("L", extent.length.to_string())
        .output()
        .unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success(),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let digests: Vec<_> = said.lines().collect();
    match digests[..] {
        [computed, stored] => assert_eq!(computed, stored),
        _ => assert!(extent.count > 1, "{said}"),
    }
    std::fs::read(directory.join("restored")).unwrap()
}
