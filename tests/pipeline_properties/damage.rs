//! Whatever is wrong with what is stored is an error that names it; what merely breaks off is fetched again.

use std::sync::atomic::Ordering;

use bytes::Bytes;
use pipeline::PipelineError;
use pipeline::index::{Block, Footer};
use pipeline::pack::{IndexInfo, PackInfo, PackOptions};
use pipeline::store::Key;
use proptest::prelude::*;
use sha2::{Digest as _, Sha256};

use crate::fixture::{Copy, FileSet, MIB, World, noise, read_tree, run};

#[derive(Debug, Clone)]
enum Damage {
    Flip { at: prop::sample::Index, bit: u8 },
    Cut { at: prop::sample::Index },
    CutFront { at: prop::sample::Index },
    Append { bytes: Vec<u8> },
    Remove,
    Replace { by: prop::sample::Index },
}

fn damage() -> impl Strategy<Value = Damage> {
    prop_oneof![
        4 => (any::<prop::sample::Index>(), 0..8_u8).prop_map(|(at, bit)| Damage::Flip { at, bit }),
        2 => any::<prop::sample::Index>().prop_map(|at| Damage::Cut { at }),
        1 => any::<prop::sample::Index>().prop_map(|at| Damage::CutFront { at }),
        1 => prop::collection::vec(any::<u8>(), 1..50).prop_map(|bytes| Damage::Append { bytes }),
        1 => Just(Damage::Remove),
        2 => any::<prop::sample::Index>().prop_map(|by| Damage::Replace { by }),
    ]
}

struct Unchanged;

impl Damage {
    /// The object afterwards, if there still is one; `Err` if this does not change it.
    fn apply(&self, body: &Bytes, others: &[Bytes]) -> Result<Option<Bytes>, Unchanged> {
        let mut changed = body.to_vec();
        match self {
            Self::Flip { at, bit } => changed[at.index(body.len())] ^= 1 << bit,
            Self::Cut { at } => changed.truncate(at.index(body.len())),
            Self::CutFront { at } => drop(changed.drain(..=at.index(body.len()))),
            Self::Append { bytes } => changed.extend_from_slice(bytes),
            Self::Remove => return Ok(None),
            Self::Replace { by } => {
                if others.is_empty() {
                    return Err(Unchanged);
                }
                changed = by.get(others).to_vec();
            }
        }
        if changed == *body {
            return Err(Unchanged);
        }
        Ok(Some(changed.into()))
    }
}

/// Files for several packs, with shared frames, frames of zeros and frames that do not compress.
fn sample() -> FileSet {
    let mut files: FileSet = (0..20_u64)
        .map(|n| {
            (
                format!("base/{n}"),
                noise(n, 300 * usize::try_from(n).unwrap()),
            )
        })
        .collect();
    files.insert("big".into(), noise(99, 3 * MIB / 2));
    files.insert("zeros".into(), vec![0; MIB + 7]);
    files.insert("text".into(), b"to and fro ".repeat(40_000));
    files
}

async fn sample_copy() -> (World, Copy) {
    let world = World::new(128 * MIB);
    let options = PackOptions {
        lanes: 2,
        pack_size: MIB as u64,
        ..PackOptions::default()
    };
    let copy = world.copy(&sample(), options, 4 * MIB).await.unwrap();
    assert!(copy.packs.len() >= 2, "{} packs", copy.packs.len());
    (world, copy)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 160, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_single_change_to_a_stored_object_is_an_error(
        victim in any::<prop::sample::Index>(),
        damage in damage(),
    ) {
        let target = tempfile::tempdir().unwrap();
        run(async {
            let (world, copy) = sample_copy().await;
            let store = &world.store.inner;
            let keys = store.keys();
            let key = victim.get(&keys).clone();
            let body = store.bytes(key.as_str()).unwrap();
            let others: Vec<_> = keys.iter().filter(|other| **other != key)
                .map(|other| store.bytes(other.as_str()).unwrap()).collect();
            let Ok(changed) = damage.apply(&body, &others) else { return Ok(()) };
            store.tamper(&key, changed);
            let error = world.extract(&copy, target.path(), 2).await;
            let Err(error) = error else {
                return Err(TestCaseError::fail(format!("{damage:?} of {key} was not seen")));
            };
            let named = matches!(&error, PipelineError::Damaged { key: named, .. } if *named == key.to_string());
            prop_assert!(named, "{damage:?} of {key}: {error}");
            prop_assert_eq!(world.budget.free_bytes(), 128 * MIB);
            Ok(())
        })?;
    }
}

#[test]
fn every_byte_of_a_small_copy_counts() {
    run(async {
        let world = World::new(128 * MIB);
        let files = FileSet::from([("a".to_owned(), b"few bytes".to_vec())]);
        let options = PackOptions {
            lanes: 1,
            ..PackOptions::default()
        };
        let copy = world.copy(&files, options, MIB).await.unwrap();
        for key in world.store.inner.keys() {
            let body = world.store.inner.bytes(key.as_str()).unwrap();
            for at in 0..body.len() {
                let mut changed = body.to_vec();
                changed[at] ^= 0x10;
                world.store.inner.tamper(&key, Some(changed.into()));
                let target = tempfile::tempdir().unwrap();
                let outcome = world.extract(&copy, target.path(), 1).await;
                let damaged = matches!(outcome, Err(PipelineError::Damaged { .. }));
                assert!(damaged, "byte {at} of {key}: {outcome:?}");
            }
            world.store.inner.tamper(&key, Some(body));
        }
        let target = tempfile::tempdir().unwrap();
        world.extract(&copy, target.path(), 1).await.unwrap();
    });
}

/// An index of these lines whose hashes are right: what only a look at its meaning can refuse.
fn forge(world: &World, lines: &[&str]) -> (Key, IndexInfo) {
    let plain: String = lines.iter().flat_map(|line| [*line, "\n"]).collect();
    let block = zstd::encode_all(plain.as_bytes(), 1).unwrap();
    let footer = Footer {
        blocks: vec![Block {
            first: String::new(),
            offset: 0,
            stored: block.len() as u64,
            plain: plain.len() as u64,
            sha256: hex::encode(Sha256::digest(&block)),
        }],
        entries: lines.len() as u64,
    };
    let footer = format!("{}\n", serde_json::to_string(&footer).unwrap());
    let footer_offset = block.len() as u64;
    let mut object = block;
    object.extend(zstd::encode_all(footer.as_bytes(), 1).unwrap());
    let key = Key::new("forged/index").unwrap();
    let info = IndexInfo {
        size: object.len() as u64,
        sha256: hex::encode(Sha256::digest(&object)),
        footer_offset,
        entries: lines.len() as u64,
        extra: serde_json::Map::new(),
    };
    world.store.inner.tamper(&key, Some(object.into()));
    (key, info)
}

/// Lines of an index, and what its refusal must say.
const LIES: &[(&[&str], &str)] = &[
    (
        &[r#"{"path":"../x","mode":384,"kind":"file","size":0}"#],
        "`..`",
    ),
    (
        &[r#"{"path":"a/../../x","mode":384,"kind":"file","size":0}"#],
        "`..`",
    ),
    (
        &[r#"{"path":"/etc/x","mode":384,"kind":"file","size":0}"#],
        "absolute",
    ),
    (
        &[r#"{"path":"a//x","mode":384,"kind":"file","size":0}"#],
        "empty component",
    ),
    (
        &[r#"{"path":"x","mode":384,"kind":"file","size":5}"#],
        "another length",
    ),
    (
        &[
            r#"{"path":"x","mode":384,"kind":"file","size":5,"extents":[{"p":0,"f":0,"n":1,"l":9}]}"#,
        ],
        "another length",
    ),
    (
        &[
            r#"{"path":"x","mode":384,"kind":"file","size":18446744073709551615,"extents":[{"p":0,"f":0,"n":1,"l":18446744073709551615},{"p":0,"f":0,"n":1,"l":1}]}"#,
        ],
        "another length",
    ),
    (
        &[
            r#"{"path":"x","mode":384,"kind":"file","size":5,"extents":[{"p":77,"f":0,"n":1,"l":5}]}"#,
        ],
        "pack 77, which does not exist",
    ),
    (
        &[
            r#"{"path":"x","mode":384,"kind":"file","size":5,"extents":[{"p":0,"f":4000000000,"n":1,"l":5}]}"#,
        ],
        "frames that do not exist",
    ),
    (
        &[
            r#"{"path":"x","mode":384,"kind":"file","size":5,"extents":[{"p":0,"f":4294967295,"n":4294967295,"l":5}]}"#,
        ],
        "frames that do not exist",
    ),
    (
        &[
            r#"{"path":"x","mode":384,"kind":"file","size":1099511627776,"extents":[{"p":0,"f":0,"n":1,"l":1099511627776}]}"#,
        ],
        "longer than its frames",
    ),
    (
        &[
            r#"{"path":"x","mode":384,"kind":"file","size":5,"extents":[{"p":0,"f":0,"n":1,"o":4294967295,"l":5}]}"#,
        ],
        "does not fit its frames",
    ),
    (
        &[
            r#"{"path":"x","mode":384,"kind":"file","size":0,"extents":[{"p":0,"f":0,"n":0,"l":0}]}"#,
        ],
        "an extent is empty",
    ),
    (
        &[
            r#"{"path":"d","mode":448,"kind":"directory"}"#,
            r#"{"path":"d","mode":448,"kind":"directory"}"#,
        ],
        "out of order",
    ),
    (
        &[r#"{"path":"x","mode":99999,"kind":"directory"}"#],
        "permission bits",
    ),
    (&["{\"path\":"], "line 1"),
    (
        &[
            r#"{"path":"d","mode":511,"kind":"symlink","target":"/tmp"}"#,
            r#"{"path":"d/x","mode":384,"kind":"file","size":0}"#,
        ],
        "below the link",
    ),
];

#[test]
fn an_index_that_lies_is_refused_by_name() {
    run(async {
        let (world, copy) = sample_copy().await;
        for (lines, expected) in LIES {
            let target = tempfile::tempdir().unwrap();
            let root = target.path().join("root");
            let index = forge(&world, lines);
            let packs = copy.packs.clone();
            let error = world.extract(&Copy { packs, index }, &root, 2).await;
            let error = error.expect_err(expected).to_string();
            assert!(error.contains(expected), "{lines:?}: {error}");
            let outside = read_tree(target.path());
            assert!(
                outside.values().all(Vec::is_empty),
                "{lines:?} left {:?}",
                outside.keys()
            );
        }
    });
}

#[test]
fn a_manifest_that_lies_about_a_pack_is_refused() {
    run(async {
        let (world, copy) = sample_copy().await;
        let right = copy.packs[0].1.clone();
        let wrong = [
            PackInfo {
                size: u64::MAX,
                ..right.clone()
            },
            PackInfo {
                size: right.size - 1,
                ..right.clone()
            },
            PackInfo {
                table_offset: 0,
                ..right.clone()
            },
            PackInfo {
                table_offset: u64::MAX,
                ..right.clone()
            },
            PackInfo {
                frames: u32::MAX,
                ..right.clone()
            },
            PackInfo {
                frames: right.frames + 1,
                ..right.clone()
            },
            PackInfo {
                plain_bytes: 0,
                ..right.clone()
            },
            PackInfo {
                table_sha256: String::new(),
                ..right.clone()
            },
        ];
        for info in wrong {
            let target = tempfile::tempdir().unwrap();
            let mut packs = copy.packs.clone();
            packs[0].1 = info.clone();
            let index = copy.index.clone();
            let outcome = world
                .extract(&Copy { packs, index }, target.path(), 2)
                .await;
            let damaged = matches!(outcome, Err(PipelineError::Damaged { .. }));
            assert!(damaged, "{info:?}: {outcome:?}");
        }
    });
}

#[test]
fn bodies_that_break_off_are_fetched_again() {
    run(async {
        let (world, copy) = sample_copy().await;
        world.store.break_after.store(700, Ordering::SeqCst);
        world.store.breaks.store(3, Ordering::SeqCst);
        let target = tempfile::tempdir().unwrap();
        world.extract(&copy, target.path(), 2).await.unwrap();
        assert!(read_tree(target.path()) == sample());
        // For ever is another matter: it ends, and says what it waited for.
        world.store.breaks.store(usize::MAX, Ordering::SeqCst);
        let target = tempfile::tempdir().unwrap();
        let error = world.extract(&copy, target.path(), 2).await.unwrap_err();
        assert!(error.to_string().contains("broke off"), "{error}");
    });
}

#[test]
fn a_cancelled_extraction_ends_soon() {
    run(async {
        let (world, copy) = sample_copy().await;
        world.throttle.set_rate(Some(1));
        let cancel = world.cancel.clone();
        tokio::spawn(async move {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            cancel.cancel();
        });
        let target = tempfile::tempdir().unwrap();
        let extraction = world.extract(&copy, target.path(), 2);
        let limit = std::time::Duration::from_secs(20);
        let outcome = tokio::time::timeout(limit, extraction)
            .await
            .expect("it hangs");
        assert!(
            matches!(outcome, Err(PipelineError::Cancelled)),
            "{outcome:?}"
        );
        assert_eq!(world.budget.free_bytes(), 128 * MIB);
    });
}
