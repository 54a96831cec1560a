//! A module of an edgezmq node, in Rust: it answers requests with what it was asked, and uploads a reading now and then.
//!
//!     edgezmq send rust-example -r anything --content '{"x": 1}' --request

mod emp;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{env, process};

use emp::{Client, Delivery, Error, Message, Outcome, Priority};

const NAME: &str = "rust-example";
const TURN: Duration = Duration::from_millis(100);

fn main() {
    match run() {
        Ok(()) => {}
        Err(fault) => {
            eprintln!("{NAME}: {fault}");
            process::exit(if matches!(fault, Error::Fenced) { 3 } else { 1 });
        }
    }
}

fn run() -> Result<(), Error> {
    let stopping = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
        signal_hook::flag::register(signal, Arc::clone(&stopping)).expect("these signals can be caught");
    }
    let context = zmq::Context::new();
    let mut client = Client::connect(&context, NAME, &emp::endpoint())?;
    let mut until: Option<Instant> = None;
    let (every, mut due, mut number) = (interval(), Instant::now(), 1);
    loop {
        if stopping.load(Ordering::Relaxed) {
            client.drain();
            let until = *until.get_or_insert_with(|| Instant::now() + emp::DRAIN);
            if client.is_idle() || Instant::now() >= until {
                break;
            }
        } else if Instant::now() >= due && client.send("@hub", Priority::Data, &reading(number)).is_ok() {
            // Otherwise the window is full, the broker or the cloud is away: the same reading after the next turn.
            number += 1;
            due = Instant::now() + every;
        }
        let wait = due.saturating_duration_since(Instant::now()).clamp(Duration::from_millis(1), TURN);
        client.turn(wait, &mut echo)?;
        for settled in client.settled() {
            if let Some(reason) = settled.refused {
                eprintln!("message {} to {}: refused: {reason}", settled.number, settled.destination);
            }
        }
    }
    client.close();
    Ok(())
}

/// A request is answered with what it was asked.
fn echo(delivery: &Delivery) -> Outcome {
    Ok(Some(delivery.message.content.clone()))
}

fn reading(number: u64) -> Message {
    Message {
        source: NAME.to_owned(),
        group: "user".to_owned(),
        resource: "default/rust-example/reading".to_owned(),
        operation: "upload".to_owned(),
        content: format!("{{\"number\": {number}}}").into_bytes(),
        ..Message::default()
    }
}

/// UPLOAD_SECONDS, default 10; less under test.
fn interval() -> Duration {
    let set =
        env::var("UPLOAD_SECONDS").ok().and_then(|text| text.parse::<f64>().ok()).filter(|seconds| *seconds > 0.0);
    let default = if env::var_os("EDGEZMQ_CONFORM").is_some() { 0.2 } else { 10.0 };
    Duration::from_secs_f64(set.unwrap_or(default))
}
