//! Rubbish on every socket: counted, refused, and the VM stays protected.

use std::{
    io::Write as _,
    net::{TcpStream, UdpSocket},
    os::unix::net::UnixStream,
};

use colo_driver_mio::frame_socket::FrameSocket;

use colod::demo::{Host, now};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use crate::common::*;

#[test]
fn on_streams_heartbeats_control_and_network_changes_nothing() {
    let Some(_alone) = alone() else { return };
    let mut stage = stage();
    let (primary, secondary) = pair(&mut stage);
    let client = client(&mut stage);
    answered(&client, 0, &primary);
    let mut random = StdRng::seed_from_u64(7);
    let mut rubbish = vec![0; 1400];
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    let cable = FrameSocket::connect(&stage.switch_path()).unwrap();
    for _ in 0..50 {
        random.fill_bytes(&mut rubbish);
        for host in [Host::A, Host::B] {
            for path in stage.beat_addresses(host) {
                udp.send_to(&rubbish, path).unwrap();
                udp.send_to(&rubbish[..96], path).unwrap();
            }
            if let Ok(mut stream) = TcpStream::connect(stage.stream_address(host)) {
                // Refused in the middle is as good.
                let _refused = stream.write_all(&rubbish);
            }
        }
        for daemon in [&primary, &secondary] {
            if let Ok(mut control) = UnixStream::connect(daemon.control()) {
                let _refused = control.write_all(&rubbish);
            }
        }
        // A frame for the guest, from an address of nobody.
        let mut frame = rubbish.clone();
        frame[..6].copy_from_slice(&stage.settings_now().mac.0);
        frame[6] &= 0xfe;
        cable.send(&frame).unwrap();
    }
    answered(&client, now(), &primary);
    assert_eq!(
        primary.status().unwrap()["protected"],
        true,
        "{}",
        primary.log()
    );
    served(client);
}
