//! The list, and who works it off.

use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::pin::Pin;
use std::time::{Duration, Instant};

use futures_util::FutureExt as _;

use crate::farm::{Farm, Shape};
use crate::{
    batches, client, clock, faults, gauss, lock, login, metadata, other, passing, transactions,
};

/// For one of them: proxies are restarted in some.
const LIMIT: Duration = Duration::from_mins(8);

type Outcome<'a> = Pin<Box<dyn Future<Output = ()> + 'a>>;

/// One thing that proxies do.
struct Behaviour {
    name: &'static str,
    check: for<'a> fn(&'a mut Farm) -> Outcome<'a>,
}

macro_rules! behaviours {
    ($($module:ident: $($name:ident),+;)+) => {
        vec![$($(Behaviour {
            name: concat!(stringify!($module), "::", stringify!($name)),
            check: |farm| Box::pin($module::$name(farm)),
        }),+),+]
    };
}

fn plain() -> Vec<Behaviour> {
    behaviours! {
        login: greeting, wrong_password, unknown_user, unknown_database;
        lock: probe_of_an_open_cluster_does_nothing, unlock_of_an_open_cluster_is_refused, without_timeout_it_fails,
            other_forms_are_no_grammar, not_within_a_transaction, through_one_proxy_for_all, one_of_two_at_once,
            others_follow_within_a_moment, it_outlives_its_session, it_lands_without_its_client, without_the_mutex_lock_does_nothing,
            without_the_mutex_unlock_does_nothing;
        passing: changes_are_refused, the_rest_passes, read_write_refuses_nearly_all, read_write_passes_these,
            read_write_keeps_transactions_open;
        batches: one_and_two_are_refused, three_pass, three_in_a_transaction_pass, without_types_they_fail_otherwise;
        transactions: commit_passes, a_refused_statement_does_not_abort;
        other: compute_nodes, compute_node_info_and_mode, storage_units, rules_without_a_clock, databases, no_storage_unit,
            no_such_table, prepared_dist_sql_fails;
        metadata: export, export_storage_nodes, import_of_what_is_there, import_of_nonsense;
        client: asks_and_is_answered, takes_and_gives_the_lock, is_told_what_is_wrong;
        faults: a_frozen_proxy_answers_later, a_cut_off_proxy_goes_on_writing, a_lock_through_a_cut_off_proxy_lands_late,
            the_lock_outlives_its_proxy, the_lock_outlives_all_proxies;
        metadata: drop_import_refresh, import_tries_the_storage_units, import_replaces_the_properties;
    }
}

fn xa_and_clock() -> Vec<Behaviour> {
    behaviours! {
        clock: the_rules_say_so, csn_advances_at_commit, the_client_reads_it;
        transactions: prepared_branches_are_seen, commit_passes, a_refused_statement_does_not_abort;
        batches: three_pass, three_in_a_transaction_pass;
        lock: through_one_proxy_for_all, others_follow_within_a_moment;
        clock: a_local_one_is_each_proxy_s_own;
    }
}

fn open_gauss() -> Vec<Behaviour> {
    behaviours! {
        gauss: greeting_of_300, greeting_of_350, greeting_of_351, wrong_password, unknown_user, unknown_database, errors_have_its_shape;
        lock: probe_of_an_open_cluster_does_nothing, unlock_of_an_open_cluster_is_refused, without_timeout_it_fails, through_one_proxy_for_all;
        batches: one_and_two_are_refused, three_pass;
        transactions: a_refused_statement_does_not_abort;
        other: compute_nodes, storage_units;
        metadata: export, export_storage_nodes;
        client: asks_and_is_answered, takes_and_gives_the_lock, is_told_what_is_wrong;
    }
}

/// Tries all that a shape is for, and fails with the names of what is not so.
pub(crate) async fn run(shape: Shape, home: Option<&Path>) {
    let begun = Instant::now();
    let mut farm = Farm::start(shape, home).await;
    let started = begun.elapsed().as_secs();
    let all = match shape {
        Shape::Plain => plain(),
        Shape::XaAndClock => xa_and_clock(),
        Shape::OpenGauss => open_gauss(),
    };
    let only = std::env::var("GS_PITR_PROXY_ONLY").ok();
    let (mut tried, mut failed) = (0, Vec::new());
    for behaviour in &all {
        if only
            .as_ref()
            .is_some_and(|only| !behaviour.name.contains(only.as_str()))
        {
            continue;
        }
        tried += 1;
        let begun = Instant::now();
        let checked = AssertUnwindSafe((behaviour.check)(&mut farm)).catch_unwind();
        let right = matches!(tokio::time::timeout(LIMIT, checked).await, Ok(Ok(())));
        let word = if right { "as listed" } else { "NOT SO" };
        println!(
            "{shape:?} {word}: {} ({} ms)",
            behaviour.name,
            begun.elapsed().as_millis()
        );
        if !right {
            failed.push(behaviour.name);
        }
        farm.settle().await;
    }
    println!(
        "{}: {} of {tried} behaviours are as listed ({shape:?}; started in {started} s, all in {} s)",
        farm.describe(),
        tried - failed.len(),
        begun.elapsed().as_secs()
    );
    assert!(
        failed.is_empty(),
        "{}: not so: {failed:#?}",
        farm.describe()
    );
}
