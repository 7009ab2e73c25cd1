//! The copies of backups: their indexes and packs.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use futures_util::StreamExt as _;
use pipeline::check::{PackFaults, PackShape};
use pipeline::error::PipelineError;
use pipeline::index::Index;
use pipeline::pack::{EntryKind, PackInfo};
use pipeline::store::Key;

use super::finding::Finding;
use super::inventory::Inventory;
use super::records::Records;
use super::rules::Rests;
use super::{Checked, Context, each};
use crate::error::CatalogError;
use crate::ids::BackupId;
use crate::keys;
use crate::model::NodeBackup;

/// Paths that a finding names; more are counted.
const FILES: usize = 20;
/// Frames that a finding names.
const FRAMES: usize = 10;

/// The copy of one node in one backup.
#[derive(Debug, Clone, Copy)]
pub(super) struct Copy<'a> {
    pub(super) id: &'a BackupId,
    pub(super) node: &'a NodeBackup,
}

/// All copies that are to be read.
pub(super) fn copies<'a>(records: &'a Records, rests: &Rests) -> Vec<Copy<'a>> {
    let sound = records
        .complete()
        .filter(|(id, _)| rests.sound.contains(*id));
    let copies = sound.flat_map(|(id, manifest)| {
        let nodes = manifest.nodes.iter();
        nodes.map(move |node| Copy { id, node })
    });
    copies.collect()
}

impl<'a> Copy<'a> {
    fn index_key(&self) -> Key {
        keys::index(self.id, self.node.node_id, self.node.attempt)
    }

    fn pack_key(&self, info: &PackInfo) -> Key {
        keys::pack(self.id, self.node.node_id, self.node.attempt, info.number)
    }

    fn finding(&self, key: &Key, what: impl Into<String>) -> Finding {
        let finding = Finding::damage(key, what).of_backup(self.id);
        finding.of_node(self.node.node_id).losing([self.id])
    }

    fn packs(self) -> impl Iterator<Item = (Copy<'a>, &'a PackInfo)> {
        self.node.packs.iter().map(move |info| (self, info))
    }
}

/// Looks only whether everything is there with the right size.
///
/// # Errors
/// [`CatalogError::Store`].
pub(super) async fn sizes(
    context: &Context<'_>,
    inventory: &Inventory,
    copies: &[Copy<'_>],
    wal: u64,
) -> Result<Checked, CatalogError> {
    let mut objects = wal;
    for copy in copies {
        let packs = copy
            .packs()
            .map(|(copy, info)| (copy.pack_key(info), info.size));
        for (key, wanted) in packs.chain([(copy.index_key(), copy.node.index.size)]) {
            objects += 1;
            let what = match inventory.size(&key) {
                Some(size) if size == wanted => continue,
                Some(size) => format!("it has {size} bytes, {wanted} were written"),
                None if context.is_there(&key).await? => continue,
                None => "the object is missing".to_owned(),
            };
            context.add_of_backup(copy.finding(&key, what)).await?;
        }
        sums(context, copy);
    }
    Ok(Checked { objects, bytes: 0 })
}

/// What the manifest says of the copy as a whole adds up.
fn sums(context: &Context<'_>, copy: &Copy<'_>) {
    let node = copy.node;
    let packed = node
        .packs
        .iter()
        .map(|pack| pack.size)
        .fold(node.index.size, u64::saturating_add);
    if packed != node.stored_bytes {
        let (id, says) = (node.node_id, node.stored_bytes);
        let what = format!("node {id}: packs and index have {packed} bytes, it says {says}");
        context.add(copy.finding(&keys::manifest(copy.id), what));
    }
}

/// Reads every byte of every copy. Returns how many objects that were.
///
/// # Errors
/// [`CatalogError::Store`] if the store as a whole cannot be asked.
pub(super) async fn read(context: &Context<'_>, copies: &[Copy<'_>]) -> Result<u64, CatalogError> {
    let jobs = context.verify.jobs.max(1);
    let sound = each(copies, jobs, |copy| async move {
        sums(context, copy);
        let packs = tables(context, copy).await?;
        let index = index(context, copy, &packs).await?;
        let whole = packs
            .into_iter()
            .filter_map(|(number, shape)| shape.map(|_| number));
        Ok((*copy, index, whole.collect::<BTreeSet<u32>>()))
    });
    let mut packs = Vec::new();
    for (copy, index, whole) in sound.await? {
        let readable = copy
            .packs()
            .filter(|(_, info)| whole.contains(&info.number));
        packs.extend(readable.map(|(copy, info)| (copy, info, index)));
    }
    let at_once = context.verify.packs_at_once();
    each(packs, at_once, |(copy, info, index)| async move {
        pack(context, &copy, info, index).await
    })
    .await?;
    let objects = copies.iter().map(|copy| copy.node.packs.len() as u64 + 1);
    Ok(objects.sum())
}

/// The frame tables. A pack whose table cannot be used is reported and `None`.
async fn tables(
    context: &Context<'_>,
    copy: &Copy<'_>,
) -> Result<BTreeMap<u32, Option<PackShape>>, CatalogError> {
    let mut shapes = BTreeMap::new();
    for info in &copy.node.packs {
        let key = copy.pack_key(info);
        let shape = pipeline::check::pack_shape(&context.verify.downloader, &key, info).await;
        let shape = match shape {
            Ok(shape) => Some(shape),
            Err(error) => {
                let what = context.of_object(error.into()).await?;
                let mut finding = copy.finding(&key, what);
                files(context, copy, info.number, None, &mut finding).await;
                context.add_of_backup(finding).await?;
                None
            }
        };
        shapes.insert(info.number, shape);
    }
    Ok(shapes)
}

/// Whether the index is right, and adds up to what the manifest says.
async fn index(
    context: &Context<'_>,
    copy: &Copy<'_>,
    packs: &BTreeMap<u32, Option<PackShape>>,
) -> Result<bool, CatalogError> {
    let (key, node) = (copy.index_key(), copy.node);
    let mut wanted: BTreeSet<&str> = node
        .attachments
        .iter()
        .map(|attachment| &*attachment.path)
        .collect();
    let read = match Index::open_with(context.verify.downloader.clone(), key.clone(), &node.index) {
        Ok(index) => {
            pipeline::check::index(&index, packs, |entry| {
                wanted.remove(&*entry.path);
            })
            .await
        }
        Err(error) => Err(error),
    };
    let what = match read {
        Err(error) => context.of_object(error.into()).await?,
        Ok(sums) if sums.files != node.files => {
            format!(
                "it has {} files, the manifest says {}",
                sums.files, node.files
            )
        }
        Ok(sums) if sums.plain_bytes != node.plain_bytes => {
            let (its, says) = (sums.plain_bytes, node.plain_bytes);
            format!("its files have {its} bytes, the manifest says {says}")
        }
        Ok(_) => match wanted.first() {
            Some(path) => format!("it lacks the attachment `{path}` that the manifest names"),
            None => return Ok(true),
        },
    };
    context.add_of_backup(copy.finding(&key, what)).await?;
    Ok(false)
}

/// Every byte of one pack.
async fn pack(
    context: &Context<'_>,
    copy: &Copy<'_>,
    info: &PackInfo,
    index: bool,
) -> Result<(), CatalogError> {
    let key = copy.pack_key(info);
    let mut finding = match pipeline::check::pack(&context.verify.downloader, &key, info).await {
        Ok(faults) if faults.is_empty() => return Ok(()),
        Ok(faults) => {
            let mut finding = copy.finding(&key, words(&faults, info));
            if index {
                let frames = faults.frames.into_keys().collect();
                files(context, copy, info.number, Some(frames), &mut finding).await;
            }
            finding
        }
        Err(PipelineError::Cancelled) => return Err(PipelineError::Cancelled.into()),
        Err(error) => {
            let what = context.of_object(error.into()).await?;
            let mut finding = copy.finding(&key, what);
            if index {
                files(context, copy, info.number, None, &mut finding).await;
            }
            finding
        }
    };
    finding.next = Some(
        "restore another backup; if the store has versions or replicas, bring this object back"
            .into(),
    );
    context.add_of_backup(finding).await
}

fn words(faults: &PackFaults, info: &PackInfo) -> String {
    if faults.parts {
        return "each frame is right, and the digest over its parts is not the manifest's"
            .to_owned();
    }
    let mut text = format!(
        "{} of {} frames are damaged:",
        faults.frames.len(),
        info.frames
    );
    for (number, damage) in faults.frames.iter().take(FRAMES) {
        let _ = write!(text, " frame {number}: {damage};");
    }
    if faults.frames.len() > FRAMES {
        text.push_str(" and more");
    }
    text.trim_end_matches(';').to_owned()
}

/// Names the files that have bytes in these frames of a pack (`None`: in any). An index that cannot be read
/// names none, and is found on its own.
async fn files(
    context: &Context<'_>,
    copy: &Copy<'_>,
    pack: u32,
    frames: Option<BTreeSet<u32>>,
    finding: &mut Finding,
) {
    let downloader = context.verify.downloader.clone();
    let Ok(index) = Index::open_with(downloader, copy.index_key(), &copy.node.index) else {
        return;
    };
    let mut entries = index.entries();
    while let Some(Ok(entry)) = entries.next().await {
        let EntryKind::File { extents, .. } = &entry.kind else {
            continue;
        };
        let concerned = extents
            .iter()
            .filter(|extent| extent.pack == pack)
            .any(|extent| {
                let end = extent.first.saturating_add(extent.count);
                let in_frames =
                    |frames: &BTreeSet<u32>| frames.range(extent.first..end).next().is_some();
                frames.as_ref().is_none_or(in_frames)
            });
        if concerned {
            finding.files_total += 1;
            if finding.files.len() < FILES {
                finding.files.push(entry.path);
            }
        }
    }
}

impl Context<'_> {
    /// Adds a finding about a backup, unless that was deleted since the listing.
    ///
    /// # Errors
    /// [`CatalogError::Store`].
    pub(super) async fn add_of_backup(&self, finding: Finding) -> Result<(), CatalogError> {
        if let Some(id) = &finding.backup
            && self.is_there(&keys::tombstone(id)).await?
        {
            return Ok(());
        }
        self.add(finding);
        Ok(())
    }
}
