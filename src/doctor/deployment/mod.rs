//! Checks of a deployment that runs: whether KV really moves, and what comes out of it is right.
//!
//! The answers hold the rest together: fresh prompts go through the proxy and, one by one, to a single worker whole. What the
//! workers count before and after, and the records of each transfer, say who computed the prompts.

mod clocks;
mod exam;
mod pages;

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::check::{Answer, Check, Group};
use super::setting::Shared;
use exam::Seen;

/// Where a deployment is, and how it is asked.
#[derive(Debug, Clone)]
pub struct Target {
    /// `host:port` of the proxy.
    pub proxy: String,
    /// `host:port` of its admin routes.
    pub admin: String,
    pub admin_token: Option<String>,
    /// The `model` that requests name; default: the first that the proxy lists.
    pub model: Option<String>,
}

/// The check that says so when nothing answers; the others need not say it again.
const FIRST: &str = "workers";

/// Longest for everything that is asked of the deployment.
const EXAM: Duration = Duration::from_secs(60);

pub(super) fn checks(setting: &Shared) -> Vec<Check> {
    let exam = Arc::new(Exam { setting: setting.clone(), seen: OnceLock::new() });
    let check = |name: &str, ask: fn(&Shared, &Seen) -> Answer| {
        let exam = exam.clone();
        let is_first = name == FIRST;
        Check::new(Group::Deployment, name, EXAM, move || exam.judged(is_first, ask))
    };
    vec![
        check(FIRST, workers),
        check("answers", answers),
        check("kv-moved", kv_moved),
        check("path", path),
        check("blocks-free", blocks_free),
        check("clocks", clocks::check),
    ]
}

/// What all checks of this group look at, asked once.
struct Exam {
    setting: Shared,
    seen: OnceLock<Result<Seen, String>>,
}

impl Exam {
    fn judged(&self, is_first: bool, judge: fn(&Shared, &Seen) -> Answer) -> Answer {
        let Some(target) = &self.setting.target else {
            return Answer::skipped("no deployment was named: give its proxy by --url http://HOST:PORT");
        };
        let seen = self.seen.get_or_init(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let asked = runtime.map_err(anyhow::Error::from).and_then(|runtime| runtime.block_on(exam::ask(target)));
            asked.map_err(|error| format!("{error:#}"))
        });
        match seen {
            Ok(seen) => judge(&self.setting, seen),
            Err(_) if !is_first => Answer::skipped(format!("the deployment does not serve; see {FIRST}")),
            Err(error) => Answer::fail(
                format!("{} does not serve: {error}", target.proxy),
                "look at the proxy's log and its workers'; --admin-url and --admin-token say where admin routes are",
            ),
        }
    }
}

fn workers(_: &Shared, seen: &Seen) -> Answer {
    let down: Vec<String> = seen
        .workers
        .iter()
        .filter(|worker| !worker.serves())
        .map(|worker| format!("{} ({}) is {}", worker.url, worker.role, worker.state))
        .collect();
    let count = |role: &str| seen.workers.iter().filter(|worker| worker.role == role).count();
    let all = format!("{} prefill and {} decode workers behind {}", count("prefill"), count("decode"), seen.proxy);
    let answer = if let Some(error) = &seen.workers_unknown {
        Answer::warn(format!("the proxy does not say which workers it has: {error}"), exam::ADMIN_HELP)
    } else if down.is_empty() {
        Answer::ok(all)
    } else {
        Answer::fail(format!("{all}; {}", down.join("; ")), "look at that worker's log; the proxy gives it no requests")
    };
    answer.with("workers", seen.workers.iter().map(|worker| worker.url.clone()).collect::<Vec<_>>())
}

fn answers(_: &Shared, seen: &Seen) -> Answer {
    let failed: Vec<&str> =
        seen.turns.iter().filter_map(|turn| turn.through.as_ref().err().map(String::as_str)).collect();
    if let Some(first) = failed.first() {
        let seen = format!("{} of {} prompts were not answered: {first}", failed.len(), seen.turns.len());
        return Answer::fail(seen, "the answer names what failed; look at `pdlink doctor` on the hosts of the workers");
    }
    let compared: Vec<_> = seen
        .turns
        .iter()
        .filter_map(|turn| Some((turn, turn.through.as_ref().ok()?, turn.alone.as_ref()?.as_ref().ok()?)))
        .collect();
    let differing: Vec<String> = compared
        .iter()
        .filter(|(_, through, alone)| through.tokens != **alone)
        .map(|(turn, ..)| turn.prompt_tokens.to_string())
        .collect();
    let all = seen.turns.len();
    if compared.is_empty() {
        let why = seen.turns.iter().find_map(|turn| turn.alone.as_ref()?.as_ref().err().cloned());
        let why = why.unwrap_or_else(|| "no worker is known that could".to_owned());
        return Answer::warn(
            format!("{all} prompts were answered; none could be given to one worker whole: {why}"),
            "give the address of the admin routes, which name the workers, and run this where they can be reached",
        );
    }
    let answer = if differing.is_empty() {
        Answer::ok(format!("{all} greedy answers through prefill and decode are equal to one worker's own"))
    } else {
        Answer::fail(
            format!(
                "{} of {} greedy answers differ from one worker's own (prompts of {} tokens)",
                differing.len(),
                compared.len(),
                differing.join(", ")
            ),
            "KV arrives wrong, or the two roles compute differently: set kv.digest = \"every\", and compare weights, dtype and versions of both",
        )
    };
    answer.with("compared", compared.len()).with("different", differing.len())
}

/// Decode's own counters decide, where it has any: a record says that bytes came, not that they were used.
fn kv_moved(_: &Shared, seen: &Seen) -> Answer {
    let least: u64 = seen.answered().map(|turn| turn.prompt_tokens.saturating_sub(1)).sum();
    let mend = "look at the proxy's log for requests that one worker served alone, at proxy.local_prefill and \
                local_prefill_below_bytes, and at decode's log for KV that it could not load";
    let recorded = seen.recorded();
    let all = seen.answered().count();
    if all == 0 {
        return Answer::skipped("no prompt was answered; see answers");
    }
    let by_records = match recorded.len() {
        0 => String::new(),
        count => format!("; decode has records of {count} of {all} transfers"),
    };
    let answer = match seen.loaded {
        Some(loaded) if loaded < least => Answer::fail(
            format!("decode loaded {loaded} prompt tokens of {least}: it computed the others itself{by_records}"),
            mend,
        ),
        Some(loaded) => {
            Answer::ok(format!("decode loaded {loaded} prompt tokens, {least} at least were to move{by_records}"))
        }
        None if recorded.len() == all => Answer::ok(format!(
            "decode has records of all {all} transfers; it counts no prompt tokens to hold them against"
        )),
        None if recorded.is_empty() && seen.records_unknown.is_some() => Answer::warn(
            format!(
                "nothing tells: decode counts no prompt tokens, and there are no records: {}",
                seen.records_unknown.as_deref().unwrap_or_default()
            ),
            exam::ADMIN_HELP,
        ),
        None => Answer::fail(
            format!("decode has records of {} of {all} transfers: it prefilled the others itself", recorded.len()),
            mend,
        ),
    };
    let bytes: u64 = recorded.iter().map(|record| record.bytes).sum();
    answer
        .with("loaded_tokens", seen.loaded)
        .with("least_tokens", least)
        .with("records", recorded.len())
        .with("bytes", bytes)
}

fn path(setting: &Shared, seen: &Seen) -> Answer {
    let mut paths: Vec<&str> =
        seen.recorded().iter().map(|record| record.path.map_or("none", |path| path.name())).collect();
    paths.sort_unstable();
    paths.dedup();
    if paths.is_empty() {
        let why = seen.records_unknown.clone().unwrap_or_else(|| "decode has none".to_owned());
        return Answer::skipped(format!("no records of transfers: {why}"));
    }
    let told = paths.join(", ");
    let best = setting.paths().first().map(|path| path.name());
    let answer = match best {
        Some(best) if paths != [best] => Answer::warn(
            format!("KV went over {told}, and the best path allowed is {best}"),
            "decode's log says why the better path could not be used",
        ),
        _ => Answer::ok(format!("KV went over {told}")),
    };
    answer.with("paths", paths)
}

fn blocks_free(_: &Shared, seen: &Seen) -> Answer {
    let held: Vec<String> = seen.held.iter().map(|(worker, what)| format!("{worker}: {what}")).collect();
    if seen.asked_at_rest == 0 {
        return Answer::skipped("no worker shows its counters");
    }
    if held.is_empty() {
        return Answer::ok(format!("{} workers are at rest with every block free", seen.asked_at_rest));
    }
    Answer::fault(
        !seen.others_ask,
        format!("{} s after the last answer: {}", exam::REST_MAX.as_secs(), held.join("; ")),
        if seen.others_ask {
            "others use this deployment now: look again when they do not"
        } else {
            "blocks that nobody frees fill the cache: look for that request in the workers' logs, and restart them"
        },
    )
}
