//! Rules of manifests and points that their types do not say. Broken by a stored object: damage; by one
//! that is to be written: refused. Whoever reads may rely on them.

use std::collections::HashSet;

use uuid::Uuid;

use crate::ids::{BackupId, PointId};
use crate::model::{Manifest, ManifestState, Metadata, NodeBackup, NodePoint, Point};
use crate::wal::WalName;

/// Why a manifest cannot be the one of `id`.
pub(crate) fn manifest(manifest: &Manifest, id: &BackupId) -> Result<(), String> {
    if manifest.backup_id != *id {
        return Err(format!("it says it is backup {}", manifest.backup_id));
    }
    if manifest.state == ManifestState::Abandoned {
        return Ok(());
    }
    if manifest.nodes.is_empty() {
        return Err("it has no nodes".to_owned());
    }
    unique(manifest.nodes.iter().map(|node| node.node_id))?;
    for node in &manifest.nodes {
        let checked = node_backup(node).and_then(|()| increment(manifest, node));
        checked.map_err(|why| format!("node {}: {why}", node.node_id))?;
    }
    Ok(())
}

/// Why a copy cannot be of a backup of this kind.
fn increment(manifest: &Manifest, node: &NodeBackup) -> Result<(), String> {
    let Some(probackup) = &node.probackup else {
        return match &manifest.parent {
            None => Ok(()),
            Some(_) => Err("it is whole, in a backup that builds on another".to_owned()),
        };
    };
    if probackup.mode.name() != manifest.mode {
        let (copy, backup) = (probackup.mode, &manifest.mode);
        return Err(format!("a {copy} copy in a {backup} backup"));
    }
    let parent = probackup.parent.as_ref().map(|parent| &parent.backup_id);
    if parent != manifest.parent.as_ref() || parent.is_some() != probackup.mode.is_increment() {
        return Err("its parent is not that of the backup".to_owned());
    }
    let (id, instance) = (&probackup.id, &probackup.instance);
    let plain = |name: &str| !name.is_empty() && name.bytes().all(|it| it.is_ascii_alphanumeric());
    if !plain(id) || !plain(instance) {
        return Err(format!("`{instance}/{id}` names no backup of a catalog"));
    }
    for wal in &probackup.wal {
        segment(&wal.segment)?;
        pipeline::index::check_path(&wal.path).map_err(|why| format!("`{}`: {why}", wal.path))?;
    }
    Ok(())
}

/// Why `child` cannot build on `parent`.
pub(crate) fn builds_on(child: &Manifest, parent: &Manifest) -> Result<(), String> {
    for node in &child.nodes {
        let of = |what: &str| format!("node {}: {what}", node.node_id);
        let link = node.probackup.as_ref().and_then(|it| it.parent.as_ref());
        let below = parent.nodes.iter().find(|it| it.node_id == node.node_id);
        let (Some(link), Some(below)) = (link, below) else {
            return Err(of("the backup that it builds on has no copy of it"));
        };
        let id = below.probackup.as_ref().map(|it| &it.id);
        if id != Some(&link.id) || below.attempt != link.attempt {
            return Err(of("the backup that it builds on has another copy of it"));
        }
        if below.epoch != node.epoch {
            return Err(of("the backup that it builds on is of another epoch"));
        }
    }
    Ok(())
}

/// Why a point cannot be the one of `id`.
pub(crate) fn point(point: &Point, id: &PointId) -> Result<(), String> {
    if point.point_id != *id {
        return Err(format!("it says it is point {}", point.point_id));
    }
    if point.nodes.is_empty() {
        return Err("it has no nodes".to_owned());
    }
    unique(point.nodes.iter().map(|node| node.node_id))?;
    if let Some(metadata) = &point.metadata {
        hash(&metadata.sha256).map_err(|why| format!("its metadata: {why}"))?;
    }
    for node in &point.nodes {
        node_point(node).map_err(|why| format!("node {}: {why}", node.node_id))?;
    }
    Ok(())
}

/// Why an object cannot be the metadata of `id`.
pub(crate) fn metadata(metadata: &Metadata, id: &PointId) -> Result<(), String> {
    if metadata.point_id != *id {
        return Err(format!("it says it is of point {}", metadata.point_id));
    }
    Ok(())
}

/// Why a backup cannot be recovered to a point.
pub(crate) fn belongs(manifest: &Manifest, point: &Point) -> Result<(), String> {
    for copy in &manifest.nodes {
        let node = copy.node_id;
        let marked = point.nodes.iter().find(|marked| marked.node_id == node);
        let marked = marked.ok_or_else(|| format!("point {} lacks node {node}", point.point_id))?;
        if marked.epoch != copy.epoch {
            let (its, ours) = (&marked.epoch, &copy.epoch);
            return Err(format!(
                "node {node}: the point is in epoch {its}, the copy in {ours}"
            ));
        }
        if lsn(&marked.record_lsn)? < lsn(&copy.stop_lsn)? {
            let (at, end) = (&marked.record_lsn, &copy.stop_lsn);
            return Err(format!(
                "node {node}: the point at {at} is before the copy's end at {end}"
            ));
        }
    }
    Ok(())
}

fn unique(nodes: impl Iterator<Item = Uuid>) -> Result<(), String> {
    let mut seen = HashSet::new();
    for node in nodes {
        if !seen.insert(node) {
            return Err(format!("it has node {node} twice"));
        }
    }
    Ok(())
}

fn node_backup(node: &NodeBackup) -> Result<(), String> {
    let (start, stop) = (lsn(&node.start_lsn)?, lsn(&node.stop_lsn)?);
    if start > stop {
        return Err("the copy ends before it starts".to_owned());
    }
    if !node.wal_segment_size.is_power_of_two()
        || !(1 << 20..=1 << 30).contains(&node.wal_segment_size)
    {
        return Err(format!(
            "no WAL segment has {} bytes",
            node.wal_segment_size
        ));
    }
    segment(&node.wal_first)?;
    segment(&node.wal_last)?;
    if node.attempt == 0 {
        return Err("attempts count from 1".to_owned());
    }
    for (place, pack) in node.packs.iter().enumerate() {
        if usize::try_from(pack.number) != Ok(place) {
            return Err(format!(
                "pack {} stands where pack {place} belongs",
                pack.number
            ));
        }
        if pack.table_offset > pack.size {
            return Err(format!(
                "pack {place}: its frame table begins after its end"
            ));
        }
        hash(&pack.parts_sha256)?;
        hash(&pack.table_sha256)?;
    }
    if node.index.footer_offset > node.index.size {
        return Err("the index's footer begins after its end".to_owned());
    }
    hash(&node.index.sha256)?;
    for attachment in &node.attachments {
        let inner = attachment.path.strip_prefix("attachments/");
        let parts = inner.unwrap_or_default().split('/');
        if parts.clone().any(|part| matches!(part, "" | "." | "..")) {
            let path = &attachment.path;
            return Err(format!("attachment `{path}` is not below `attachments/`"));
        }
    }
    let mut oids = HashSet::new();
    for tablespace in &node.tablespaces {
        if !oids.insert(tablespace.oid) {
            return Err(format!("it has tablespace {} twice", tablespace.oid));
        }
    }
    Ok(())
}

fn node_point(node: &NodePoint) -> Result<(), String> {
    if lsn(&node.record_lsn)? >= lsn(&node.end_lsn)? {
        return Err("the restore point's record ends before it starts".to_owned());
    }
    if node.restore_point.is_empty() || node.restore_point.len() > 63 {
        return Err("a restore point's name has 1 to 63 bytes".to_owned());
    }
    segment(&node.wal_first)?;
    segment(&node.wal_last)
}

fn segment(name: &str) -> Result<(), String> {
    match name.parse::<WalName>() {
        Ok(name) if !name.is_history() => Ok(()),
        _ => Err(format!("`{name}` is no WAL segment")),
    }
}

fn hash(text: &str) -> Result<(), String> {
    let digit = |byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    if text.len() == 64 && text.bytes().all(digit) {
        Ok(())
    } else {
        Err(format!("`{text}` is no SHA-256"))
    }
}

/// `X/X` as a number.
pub(crate) fn lsn(text: &str) -> Result<u64, String> {
    let half = |digits: &str| {
        let valid =
            (1..=8).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_hexdigit());
        valid
            .then(|| u64::from_str_radix(digits, 16).ok())
            .flatten()
    };
    text.split_once('/')
        .and_then(|(high, low)| Some(half(high)? << 32 | half(low)?))
        .ok_or_else(|| format!("`{text}` is no WAL position"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_two_hex_numbers() {
        assert_eq!(lsn("A/10"), Ok(0xA_0000_0010));
        assert_eq!(lsn("0/0"), Ok(0));
        for bad in [
            "",
            "/",
            "1",
            "1/",
            "/1",
            "1/2/3",
            "123456789/0",
            "+1/0",
            "g/0",
        ] {
            assert!(lsn(bad).is_err(), "{bad}");
        }
    }
}
