//! What node 0 does about each thing that nodes say and about each that befalls them.

use super::*;

fn machine() -> Membership {
    let workers =
        [(0, vec![]), (1, vec!["prefill_0".to_owned()]), (2, vec!["decode_0".to_owned(), "decode_1".to_owned()])];
    Membership::new(workers.into(), vec!["model M".to_owned()], "1", false)
}

fn card(rank: usize) -> NodeCard {
    NodeCard { build: "1".to_owned(), rank, shape: vec!["model M".to_owned()] }
}

fn hello(line: Line, incarnation: u64, rank: usize) -> Event {
    Event::Hello { line, incarnation, card: card(rank), from: format!("host{rank}") }
}

fn seat(worker: &str, port: u16, serves: bool) -> Seat {
    let reach = "10.0.0.1".to_owned();
    let (kv_reach, kv_ports, weights_ports) = (reach.clone(), vec![port + 1], Vec::new());
    Seat { worker: worker.to_owned(), reach, kv_reach, port, kv_ports, weights_ports, serves }
}

fn says(line: Line, says: NodeSays) -> Event {
    Event::Says { line, says }
}

fn share(line: Line, seats: Vec<Seat>) -> Event {
    says(line, NodeSays::Share { seats, ports: vec![("HTTP port".to_owned(), 8100)] })
}

fn worker(line: Line, name: &str, serves: bool) -> Event {
    says(line, NodeSays::Worker { worker: name.to_owned(), serves, why: "it ended".to_owned() })
}

fn ups_and_downs(actions: &[Action]) -> Vec<String> {
    let told = |action: &Action| match action {
        Action::Up { worker } => Some(format!("+{worker}")),
        Action::Down { worker, .. } => Some(format!("-{worker}")),
        _ => None,
    };
    actions.iter().filter_map(told).collect()
}

fn events(actions: &[Action]) -> Vec<&'static str> {
    let said = |action: &Action| match action {
        Action::Say(said) => Some(said.event),
        _ => None,
    };
    actions.iter().filter_map(said).collect()
}

/// All nodes are here and serve.
fn serving() -> Membership {
    let mut nodes = machine();
    nodes.on(hello(1, 11, 1));
    nodes.on(share(1, vec![seat("prefill_0", 8100, false)]));
    nodes.on(hello(2, 22, 2));
    nodes.on(share(2, vec![seat("decode_0", 8200, false), seat("decode_1", 8201, false)]));
    for (line, name) in [(1, "prefill_0"), (2, "decode_0"), (2, "decode_1")] {
        assert!(!nodes.all_serve());
        assert_eq!(ups_and_downs(&nodes.on(worker(line, name, true))), [format!("+{name}")]);
    }
    assert!(nodes.all_serve());
    nodes.on(Event::Ready);
    nodes
}

#[test]
fn the_run_waits_for_every_worker_of_every_node() {
    let mut nodes = machine();
    assert_eq!(nodes.missing(), [1, 2]);
    assert_eq!(nodes.on(hello(1, 11, 1)), [Action::Welcome { line: 1, rank: 1, ports: vec![] }]);
    assert_eq!(nodes.missing(), [1, 2], "it has told nothing yet");
    let actions = nodes.on(share(1, vec![seat("prefill_0", 8100, false)]));
    assert_eq!((events(&actions), nodes.missing()), (vec!["node_joined"], vec![2]));
    assert!(actions.contains(&Action::Seat(seat("prefill_0", 8100, false))));
    assert_eq!(nodes.waiting_for(), ["prefill_0", "decode_0", "decode_1"]);
    serving();
}

#[test]
fn a_lost_node_costs_its_own_workers_and_comes_back_with_its_ports() {
    let mut nodes = serving();
    let actions = nodes.on(Event::Gone { line: 2, why: "silent".to_owned() });
    assert_eq!(
        (ups_and_downs(&actions), events(&actions)),
        (vec!["-decode_0".into(), "-decode_1".into()], vec!["node_lost"])
    );
    assert_eq!(nodes.missing(), [2]);
    // Another launcher, started anew: it is given the ports it had, and its workers come back as they serve.
    let ports = vec![("HTTP port".to_owned(), 8100)];
    assert_eq!(nodes.on(hello(3, 33, 2)), [Action::Welcome { line: 3, rank: 2, ports }]);
    let seats = vec![seat("decode_0", 8200, false), seat("decode_1", 8201, false)];
    assert!(ups_and_downs(&nodes.on(share(3, seats))).is_empty());
    assert_eq!(ups_and_downs(&nodes.on(worker(3, "decode_1", true))), ["+decode_1"]);
    // The same, elsewhere: the proxy could not find it.
    nodes.on(Event::Gone { line: 3, why: "hung up".to_owned() });
    nodes.on(hello(4, 44, 2));
    let moved = vec![seat("decode_0", 9200, false), seat("decode_1", 8201, false)];
    assert!(matches!(&nodes.on(share(4, moved))[..], [Action::Refuse { again: false, .. }]));
}

#[test]
fn a_launcher_that_connects_again_is_the_same_node_and_its_old_line_means_nothing() {
    let mut nodes = serving();
    assert!(matches!(nodes.on(hello(5, 11, 1))[..], [Action::Welcome { .. }]));
    assert!(nodes.on(Event::Gone { line: 1, why: "silent".to_owned() }).is_empty());
    assert!(nodes.on(worker(1, "prefill_0", false)).is_empty());
    let actions = nodes.on(share(5, vec![seat("prefill_0", 8100, true)]));
    assert_eq!(ups_and_downs(&actions), ["+prefill_0"]);
    assert!(nodes.all_serve());
    // Meanwhile a worker had died: that is told with the share.
    nodes.on(hello(6, 11, 1));
    assert_eq!(ups_and_downs(&nodes.on(share(6, vec![seat("prefill_0", 8100, false)]))), ["-prefill_0"]);
}

#[test]
fn who_does_not_belong_is_refused_by_name() {
    let mut nodes = serving();
    let mut refused = |event: Event| match nodes.on(event).into_iter().next() {
        Some(Action::Refuse { why, again, .. }) => (why, again),
        other => panic!("not refused: {other:?}"),
    };
    let (why, again) = refused(hello(9, 99, 1));
    assert!(why.contains("node 1 is here, at host1") && again, "{why}");
    assert!(refused(hello(9, 99, 0)).0.contains("say --node RANK"));
    assert!(refused(hello(9, 99, 3)).0.contains("no node 3"));
    let other = |change: fn(&mut NodeCard)| {
        let mut card = card(1);
        change(&mut card);
        Event::Hello { line: 9, incarnation: 99, card, from: "x".to_owned() }
    };
    assert!(refused(other(|card| card.build = "2".to_owned())).0.contains("it is pdlink 2, and node 0 is 1"));
    let (why, again) = refused(other(|card| card.shape = vec!["model N".to_owned()]));
    assert!(why.contains("model N, where node 0 has model M") && !again, "{why}");
    assert!(refused(other(|card| card.shape.push("more".to_owned()))).0.contains("more, where node 0 has nothing"));
    assert!(refused(share(1, vec![seat("decode_9", 1, true)])).0.contains("others than node 0 has"));
}

#[test]
fn a_failure_ends_the_run_before_it_was_ready_and_costs_its_node_later() {
    let failed = |line| says(line, NodeSays::Failed { why: "prefill_0 exited".to_owned() });
    let mut starting = machine();
    starting.on(hello(1, 11, 1));
    assert!(matches!(&starting.on(failed(1))[..], [Action::End { why }] if why == "node 1: prefill_0 exited"));
    let mut nodes = serving();
    let actions = nodes.on(failed(1));
    assert_eq!((ups_and_downs(&actions), events(&actions)), (vec!["-prefill_0".into()], vec!["node_failed"]));
    let mut strict = serving();
    strict.never_restarts = true;
    assert!(matches!(&strict.on(failed(1))[..], [Action::End { .. }]));
}

#[test]
fn a_node_that_leaves_is_drained_first() {
    let mut nodes = serving();
    let leaving = says(2, NodeSays::Leaving { by: "SIGTERM".to_owned() });
    let actions = nodes.on(leaving.clone());
    assert_eq!(ups_and_downs(&actions), ["-decode_0", "-decode_1"]);
    assert!(actions.contains(&Action::Drain { rank: 2 }));
    assert!(nodes.on(worker(2, "decode_0", true)).is_empty(), "it takes nothing new");
    assert_eq!(nodes.on(Event::Drained { rank: 2 }), [Action::TellDrained { line: 2 }]);
    assert_eq!(events(&nodes.on(Event::Gone { line: 2, why: "hung up".to_owned() })), ["node_left"]);
    assert!(nodes.on(Event::Drained { rank: 2 }).is_empty());
    let mut starting = machine();
    starting.on(hello(2, 22, 2));
    assert!(matches!(&starting.on(leaving)[..], [Action::End { .. }]));
}
