use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::symlink;

use super::*;

fn make(root: &Path, files: &[&str]) {
    for file in files {
        let path = root.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, file).unwrap();
    }
}

fn source(root: &Path) -> Source {
    fs::create_dir_all(root.join("pg_tblspc")).unwrap();
    Source {
        pgdata: root.to_owned(),
        version_directory: "PG_15_1".into(),
        tablespaces: TablespaceList::read(root).unwrap(),
        stats_temp: None,
    }
}

fn walked(source: &Source) -> Result<Vec<Found>, CopyError> {
    let mut all = Vec::new();
    walk(source, &mut |found| {
        all.push(found);
        Ok(())
    })?;
    Ok(all)
}

fn paths(all: &[Found]) -> Vec<String> {
    all.iter()
        .map(|found| match found {
            Found::Directory { path, .. } => format!("{path}/"),
            Found::Link { path, target, .. } => format!("{path} -> {target}"),
            Found::Outside { path, target } => format!("{path} => {target}"),
            Found::File(file) => match file.segment {
                Some(segment) => format!("{} #{segment}", file.path),
                None => file.path.clone(),
            },
            Found::LeftOut(what) => format!("! {what}"),
        })
        .collect()
}

#[test]
fn a_walk_finds_what_a_base_backup_has() {
    let home = tempfile::tempdir().unwrap();
    let root = home.path().join("data dir");
    let inputs = [
        "PG_VERSION",
        "postmaster.pid",
        "backup_label.old",
        "a name with spaces",
        "global/pg_control",
        "global/1262",
        "global/pg_filenode.map",
        "global/pg_internal.init",
        "base/5/16384",
        "base/5/16384.1",
        "base/5/16384_fsm",
        "base/5/16400",
        "base/5/16400.1",
        "base/5/16400_fsm",
        "base/5/16400_init",
        "base/5/t3_16500",
        "base/5/PG_VERSION",
        "base/pgsql_tmp/pgsql_tmp1.0",
        "pg_wal/000000010000000000000001",
        "pg_replslot/a/state",
        "pg_xact/0000",
    ];
    make(&root, &inputs);
    let expected = [
        "PG_VERSION",
        "a name with spaces",
        "base/",
        "base/5/",
        "base/5/16384 #0",
        "base/5/16384.1 #1",
        "base/5/16384_fsm #0",
        "base/5/16400_init #0",
        "base/5/PG_VERSION",
        "global/",
        "global/1262 #0",
        "global/pg_filenode.map",
        "pg_replslot/",
        "pg_tblspc/",
        "pg_wal/",
        "pg_xact/",
        "pg_xact/0000",
    ];
    assert_eq!(paths(&walked(&source(&root)).unwrap()), expected);
}

#[test]
fn of_tablespaces_only_this_versions_directory_is_ours() {
    let home = tempfile::tempdir().unwrap();
    let root = home.path().join("data");
    let outside = home.path().join("space one");
    make(&outside, &["PG_14_1/5/1", "PG_15_1/5/16384", "other"]);
    make(
        &root,
        &["pg_tblspc/17000/PG_15_1/5/17001", "inner/PG_15_1/5/1"],
    );
    symlink(&outside, root.join("pg_tblspc/16999")).unwrap();
    symlink(root.join("inner"), root.join("pg_tblspc/18000")).unwrap();
    let source = source(&root);
    make(&root, &["pg_tblspc/19000/PG_15_1/5/1"]);
    let expected = [
        "inner/",
        "pg_tblspc/",
        "pg_tblspc/16999/",
        "pg_tblspc/16999/PG_15_1/",
        "pg_tblspc/16999/PG_15_1/5/",
        "pg_tblspc/16999/PG_15_1/5/16384 #0",
        "pg_tblspc/17000/",
        "pg_tblspc/17000/PG_15_1/",
        "pg_tblspc/17000/PG_15_1/5/",
        "pg_tblspc/17000/PG_15_1/5/17001 #0",
        "pg_tblspc/18000/",
        "pg_tblspc/18000/PG_15_1/",
        "pg_tblspc/18000/PG_15_1/5/",
        "pg_tblspc/18000/PG_15_1/5/1 #0",
    ];
    assert_eq!(paths(&walked(&source).unwrap()), expected);
    assert_eq!(source.tablespaces.in_place, [17000]);
    let oids: Vec<u32> = source.tablespaces.linked.iter().map(|t| t.oid).collect();
    assert_eq!(oids, [16999, 18000]);
}

#[test]
fn links_are_followed_out_and_kept_inside() {
    let home = tempfile::tempdir().unwrap();
    let root = home.path().join("data");
    let outside = home.path().join("outside");
    make(&root, &["conf/real.conf", "x"]);
    make(&outside, &["wal/1", "log/today", "one.conf"]);
    symlink(outside.join("wal"), root.join("pg_wal")).unwrap();
    symlink(outside.join("log"), root.join("log")).unwrap();
    symlink(outside.join("one.conf"), root.join("one.conf")).unwrap();
    symlink(root.join("conf/real.conf"), root.join("my.conf")).unwrap();
    symlink(root.join("x"), root.join("conf/up")).unwrap();
    symlink("/", root.join("everything")).unwrap();
    symlink("nowhere", root.join("dangling")).unwrap();
    symlink(&outside, outside.join("log/loop")).unwrap();
    let shown = |path: &str| outside.join(path).display().to_string();
    let expected = [
        "conf/".into(),
        "conf/real.conf".into(),
        "conf/up -> ../x".into(),
        "! `dangling` is a link to `nowhere`, which does not exist".into(),
        "! `everything` is a link to `/`, which it is in".into(),
        format!("log => {}", shown("log")),
        "log/".into(),
        format!(
            "! `log/loop` is a link to `{}`, which it is in",
            outside.display()
        ),
        "log/today".into(),
        "my.conf -> conf/real.conf".into(),
        format!("one.conf => {}", shown("one.conf")),
        "one.conf".into(),
        "pg_tblspc/".into(),
        "pg_wal/".into(),
        "x".into(),
    ];
    assert_eq!(paths(&walked(&source(&root)).unwrap()), expected);
}

#[test]
fn a_name_that_is_not_utf8_is_refused_by_name() {
    let home = tempfile::tempdir().unwrap();
    make(home.path(), &["base/5/1"]);
    let name = std::ffi::OsStr::from_bytes(b"caf\xe9");
    fs::write(home.path().join("base").join(name), "x").unwrap();
    let error = walked(&source(home.path())).unwrap_err().to_string();
    assert!(error.contains("base/caf"), "{error}");
}
