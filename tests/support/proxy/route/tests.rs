//! Statements and where they go.

use bytes::Bytes;

use super::super::wire::Bind;
use super::*;

fn routed(sql: &str, values: Option<&Values>) -> Result<Vec<Part>, Refusal> {
    let statement = Statement::parse(sql).unwrap();
    let table = table(&statement);
    route(&statement, values, table.as_deref(), "id", 2).map(|route| route.parts)
}

fn nodes(sql: &str) -> Vec<usize> {
    let parts = routed(sql, None).unwrap();
    parts.iter().map(|part| part.node).collect()
}

fn values(formats: &[i16], values: &[&[u8]]) -> Values {
    let values = values
        .iter()
        .map(|value| Some(Bytes::copy_from_slice(value)));
    Values {
        types: vec![20; values.len()],
        bind: Bind {
            portal: String::new(),
            statement: String::new(),
            formats: formats.to_vec(),
            values: values.collect(),
            result_formats: vec![],
        },
    }
}

#[test]
fn a_number_for_the_column_means_one_node() {
    for (sql, expected) in [
        ("SELECT * FROM account WHERE id = 4", 0),
        ("SELECT * FROM account a WHERE a.id = 5 FOR UPDATE", 1),
        (
            "UPDATE account SET balance = balance - 1 WHERE id = '7' AND balance > 3",
            1,
        ),
        (
            "delete from public.account where balance = 3 and id=-2::bigint;",
            0,
        ),
        ("SELECT * FROM account WHERE (id) = 1 AND id = 2", 0),
        ("SELECT * FROM account WHERE id IN (1, 3, 5)", 1),
        ("INSERT INTO account VALUES (3, 'a,b')", 1),
        (
            "INSERT INTO account (balance, id) VALUES (f(1, 2), 4) RETURNING id",
            0,
        ),
    ] {
        assert_eq!(nodes(sql), [expected], "{sql}");
    }
}

#[test]
fn anything_else_of_a_table_goes_everywhere() {
    for sql in [
        "SELECT * FROM account",
        "SELECT * FROM account WHERE id = 1 OR id = 3",
        "SELECT * FROM account WHERE id = 1 + 1",
        "SELECT * FROM account WHERE id > 1",
        "SELECT * FROM account WHERE balance IN (SELECT 1 WHERE id = 1)",
        "UPDATE account SET id = 3",
        "CREATE TABLE t (id bigint)",
        "TRUNCATE account",
        "VACUUM account",
    ] {
        assert_eq!(nodes(sql), [0, 1], "{sql}");
    }
    assert_eq!(nodes("SELECT * FROM account WHERE id IN (1, 2)"), [1, 0]);
}

#[test]
fn what_has_no_table_goes_to_the_first() {
    for sql in [
        "SELECT 1",
        "SELECT pg_current_xact_id()",
        "SHOW work_mem",
        "SELECT * FROM generate_series(1, 3)",
        "SELECT * FROM pg_catalog.pg_class",
    ] {
        assert_eq!(nodes(sql), [0], "{sql}");
    }
}

#[test]
fn names_of_tables() {
    for (sql, expected) in [
        ("CREATE TABLE IF NOT EXISTS public.t (id int)", Some("t")),
        ("CREATE INDEX ON t (a)", Some("t")),
        ("CREATE UNIQUE INDEX i ON t (a)", Some("t")),
        ("TRUNCATE TABLE \"T\"", Some("T")),
        ("INSERT INTO t(id) VALUES (1)", Some("t")),
        ("DELETE FROM ONLY t", Some("t")),
        ("SELECT 1", None),
        ("CREATE SCHEMA s", None),
    ] {
        let statement = Statement::parse(sql).unwrap();
        assert_eq!(table(&statement).as_deref(), expected, "{sql}");
    }
}

#[test]
fn rows_of_an_insert_are_divided() {
    let sql = "INSERT INTO account (id, name) VALUES (1, 'a'), (2, '(b'), (3, 'c') RETURNING id";
    let parts = routed(sql, None).unwrap();
    let texts: Vec<_> = parts.iter().map(|p| (p.node, p.sql.as_str())).collect();
    let head = "INSERT INTO account (id, name) VALUES";
    assert_eq!(
        texts,
        [
            (0, format!("{head} (2, '(b') RETURNING id").as_str()),
            (
                1,
                format!("{head} (1, 'a'), (3, 'c') RETURNING id").as_str()
            ),
        ]
    );
}

#[test]
fn parameters_in_text_and_binary() {
    let sql = "UPDATE account SET balance = $1 WHERE id = $2";
    let text = values(&[], &[b"10", b"3"]);
    assert_eq!(routed(sql, Some(&text)).unwrap()[0].node, 1);
    let binary = values(&[1], &[&10_i64.to_be_bytes(), &6_i32.to_be_bytes()]);
    assert_eq!(routed(sql, Some(&binary)).unwrap()[0].node, 0);
    assert_eq!(routed(sql, Some(&binary)).unwrap()[0].sql, sql);
}

#[test]
fn parameters_of_divided_rows_are_numbered_anew() {
    let sql = "INSERT INTO account VALUES ($1, $2), ($3, $4)";
    let given = values(&[0, 0, 1, 0], &[b"1", b"a", &2_i64.to_be_bytes(), b"b"]);
    let parts = routed(sql, Some(&given)).unwrap();
    assert_eq!(parts.len(), 2);
    let [even, odd] = [&parts[0], &parts[1]];
    assert_eq!(even.sql.trim(), "INSERT INTO account VALUES ($1, $2)");
    assert_eq!(odd.sql.trim(), "INSERT INTO account VALUES ($1, $2)");
    let even = even.values.as_ref().unwrap();
    assert_eq!(even.bind.formats, [1, 0]);
    assert_eq!(even.bind.values[1].as_deref(), Some(&b"b"[..]));
    assert_eq!(odd.values.as_ref().unwrap().bind.formats, [0, 0]);
}

#[test]
fn an_insert_without_a_number_is_refused() {
    for sql in [
        "INSERT INTO account SELECT g FROM generate_series(1, 9) g",
        "INSERT INTO account (balance) VALUES (1)",
        "INSERT INTO account VALUES (nextval('s'))",
        "INSERT INTO account DEFAULT VALUES",
    ] {
        let error = routed(sql, None).unwrap_err();
        assert_eq!(error.state, "0A000", "{sql}");
    }
}
